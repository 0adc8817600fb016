"""The machine's side: PostgreSQL, the MLflow server and the Ray head of one data directory.

Runs as `python -m cluster VERB`; see README.md.
"""
