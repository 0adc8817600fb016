"""Experiment orchestrator for PyTorch on Ray."""
