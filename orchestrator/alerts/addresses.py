"""Where channels lead: a file that only its owner reads, beside the tracker's log. PostgreSQL has the channels' ids."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.alerts.plan import Channel

PROTOCOL = 1


class Addresses:
    """`put` returns when the file is on the disk. `place` names this file: what is to be sent through a channel in it
    is sent by whoever has it. Safe for threads; one process at a time. Raises OSError, and ValueError for a file that
    is none of ours."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._channels: dict[str, Channel] = {}
        self._is_kept = True
        """The place has its name for good."""
        try:
            raw = json.loads(file.read_text())
            if raw["protocol"] != PROTOCOL:
                raise ValueError(f"{file} has protocol {raw['protocol']}, this version speaks {PROTOCOL}")
            self.place: str = raw["place"]
            self._channels = {id_: Channel(**channel) for id_, channel in raw["channels"].items()}
        except FileNotFoundError:
            self.place, self._is_kept = uuid.uuid4().hex, False
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error

    def keep(self) -> None:
        """Makes sure that the next process has the same place."""
        with self._lock:
            if not self._is_kept:
                self._save()

    def put(self, channel: Channel) -> str:
        """The channel's id; the same for the same channel."""
        with self._lock:
            for id_, known in self._channels.items():
                if known == channel:
                    return id_
            id_ = uuid.uuid4().hex[:12]
            self._channels[id_] = channel
            try:
                self._save()
            except OSError:
                del self._channels[id_]
                raise
            return id_

    def find(self, id_: str) -> Channel | None:
        return self._channels.get(id_)

    def _save(self) -> None:
        channels = {
            id_: {"kind": channel.kind, "options": dict(channel.options)} for id_, channel in self._channels.items()
        }
        document: Mapping[str, Any] = {"protocol": PROTOCOL, "place": self.place, "channels": channels}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_name(f".{self._file.name}.{os.urandom(4).hex()}")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as out:
                json.dump(document, out)
                out.flush()
                os.fsync(descriptor)
            fresh.rename(self._file)
            self._is_kept = True
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
