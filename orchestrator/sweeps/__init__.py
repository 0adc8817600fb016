"""Sweeps: which trial runs next, and why. Values and numbered decisions in, choices out."""
