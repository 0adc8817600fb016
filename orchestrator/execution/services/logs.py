"""Where services write what they have to say."""

from __future__ import annotations

from pathlib import Path

from orchestrator.tracking.circuits import directory_of


def node_logs(spool_directory: str) -> list[Path]:
    """Where the own log of what every node has goes: beside the spools in a data directory, else among them."""
    spools = Path(spool_directory)
    return [*([spools.parent / "logs"] if spools.name == "spools" else []), spools / ".logs"]


def health(logs: Path) -> Path:
    """Where a service says which others are away: beside the logs of its data directory."""
    return directory_of(logs.parent)
