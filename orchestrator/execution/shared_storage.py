"""Do all nodes see the same files under a local path? Asked before a run exists, by a file that is written here."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from orchestrator.errors import ConfigError

PATIENCE = 3.0
"""Seconds in which a file that was written on one host should be seen on another; network file systems keep listings
for a moment."""

Ask = Callable[[str, str], Mapping[str, str]]
"""(path, token) -> node -> why it does not see the token in that file, '' if it does."""


def local_path(url: str) -> Path | None:
    """The path of a storage URL that is a plain local one; None for `s3://` and the like."""
    if "://" in url and not url.startswith("file://"):
        return None
    return Path(unquote(urlsplit(url).path) if url.startswith("file://") else url)


def read_marker(path: str, token: str, patience: float = PATIENCE) -> str:
    """'' if the file holds the token, else why not. Tries for `patience` seconds."""
    deadline = time.monotonic() + patience
    while True:
        why = _why_unseen(path, token)
        if not why or time.monotonic() >= deadline:
            return why
        time.sleep(0.1)


def _why_unseen(path: str, token: str) -> str:
    try:
        found = Path(path).read_text()
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return "" if found == token else "another file is there"


def check_shared(url: str, host: str, ask: Ask) -> None:
    """Raises ConfigError unless every node that is asked reads what is written on this one (`host`)."""
    directory = local_path(url)
    if directory is None:
        return
    token = secrets.token_hex(16)
    marker = directory / f".seen-by-all-{token[:8]}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _write(marker, token)
    except OSError as error:
        why = f"{directory} cannot be written on {host} ({(error.strerror or str(error)).lower()})."
        raise ConfigError("storage.url", url, why, "Choose a directory of yours.") from error
    try:
        blind = {node: why for node, why in ask(str(marker), token).items() if why}
    finally:
        marker.unlink(missing_ok=True)
    if blind:
        node, why = sorted(blind.items())[0]
        others = f", nor on {len(blind) - 1} more" if len(blind) > 1 else ""
        raise ConfigError(
            "storage.url",
            url,
            f"is a directory of one machine: what was written there on {host} is not seen on {node} ({why}){others}. "
            "Workers there would write checkpoints that the others never find.",
            "Use storage that all nodes share: a path mounted on each of them, or a URL such as s3://bucket/path. "
            "Or keep all workers on one node: resources.placement=strict_pack.",
        )


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # another host sees it then at the latest
