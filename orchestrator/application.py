"""Where the application folders (`cluster/`, `actors/`, `jobs/`) are.

They are no import packages of the installation, because a user's project may have folders of the same names.
Whoever runs one of them starts `python -P -m cluster …` with PYTHONPATH=root().
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def root() -> Path:
    """The directory that holds `cluster/`, `actors/` and `jobs/`: inside the installed package, or the checkout."""
    package = Path(__file__).resolve().parent
    for place in (package / "_application", package.parent):
        if (place / "cluster" / "__main__.py").is_file() and (place / "actors").is_dir():
            return place
    raise FileNotFoundError(f"no cluster/ and actors/ in {package / '_application'} or {package.parent}: reinstall us")


def version() -> str:
    """Of the installed distribution; '' for a checkout that was never installed."""
    try:
        return metadata.version("ray-orchestrator")
    except metadata.PackageNotFoundError:
        return ""
