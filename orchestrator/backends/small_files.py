"""Reads small files of a run's directory for somebody who must not wait: a hanging disk or bucket costs him a moment,
once."""

from __future__ import annotations

import threading

from orchestrator.backends.storage import Storage


class NotRead(Exception):
    """The file was not read: not there, outside the directory, too large, or its storage does not answer."""


class SmallFiles:
    """`read` gives a file's content or raises `NotRead` within `patience` seconds.

    One file at a time; while an earlier read still hangs in its storage, all others are refused at once.
    """

    def __init__(self, *, most_bytes: int = 1_000_000, patience: float = 2.0) -> None:
        self.most_bytes = most_bytes
        self._patience = patience
        self._reading: threading.Thread | None = None

    def read(self, directory: str, uri: str) -> bytes:
        """The file at `uri`, which must lie in `directory` (both as the run's record has them)."""
        if self._reading is not None and self._reading.is_alive():
            raise NotRead("the storage does not answer")
        found: list[bytes | Exception] = []

        def read() -> None:
            try:
                storage = Storage(directory)
                with storage.open_input(_inside(storage.uri(), uri)) as source:
                    found.append(source.read(self.most_bytes + 1))
            except Exception as error:  # whatever the storage's library raises: the file is not read
                found.append(error)

        self._reading = threading.Thread(target=read, name="small-file", daemon=True)
        self._reading.start()
        self._reading.join(self._patience)
        if not found:
            raise NotRead("the storage does not answer")
        if isinstance(found[0], Exception):
            raise NotRead(str(found[0])) from found[0]
        if len(found[0]) > self.most_bytes:
            raise NotRead(f"it is larger than {self.most_bytes} bytes")
        return found[0]


def _inside(root: str, uri: str) -> str:
    uri = uri.removeprefix("file://") if not root.startswith("file://") else uri
    if not uri.startswith(f"{root.rstrip('/')}/"):
        raise NotRead(f"it is not in the run's directory {root}")
    return uri[len(root.rstrip("/")) + 1 :]
