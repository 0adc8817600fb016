"""Names in a run's directory. Everything else (checkpoints/, artifacts/, logs/, provenance/) is its writers' business.

`<storage>/<experiment>/<run>/`; the run's id is its time of creation and eight hex digits.
"""

from __future__ import annotations

IDENTITY = "run.json"
"""Who this is and how it stands: written by the driver when an attempt begins and ends, needs no service."""
RECORD = "record.json"
"""All that the database knows but points; written by the directory service."""
METRICS = "metrics.csv"
"""All points; written when the run has ended, and now and then before."""
README = "README.md"

CHECKPOINTS = "checkpoints"

README_TEXT = """# A run

`run.json` tells which run this is, `record.json` everything that was recorded about it, `metrics.csv` every point of
every metric, `config.yaml` its configuration. `logs/attempt-N/` has what each process printed, as text and as JSON
lines; `provenance/`, `checkpoints/` and `artifacts/` are what their names say. The database is the truth;
`record.json` and `metrics.csv` are copies of it. Nothing here needs a service to be read.
"""
