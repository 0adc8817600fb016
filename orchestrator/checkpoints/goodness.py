"""Which checkpoints are no good although every byte of them is right: those of a training that had gone wrong by then.

A mark is a small file, `bad/attempt-<n>-step-<s>.json` beside the checkpoints: what attempts up to n saved after s.
It is written before the attempt ends, so that nobody goes on from what it means, whoever dies next; it also means what
a writer commits later of that attempt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Protocol

from orchestrator.backends.storage import Storage

DIRECTORY = "bad"
"""Beside the checkpoints."""


class Dated(Protocol):
    """A manifest, or what is told of a checkpoint."""

    @property
    def attempt(self) -> int: ...
    @property
    def step(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """What an attempt that went wrong leaves behind."""

    attempt: int
    good_step: int
    """The last step at which all was well."""
    why: str = ""
    """What was found, in words."""
    at: float = 0.0
    """Seconds since 1970."""

    def means(self, checkpoint: Dated) -> bool:
        return checkpoint.attempt <= self.attempt and checkpoint.step > self.good_step


def mark(storage: Storage, made: Mark) -> None:
    """From now on nobody goes on from what it means. `storage` is the checkpoints' root. Raises OSError."""
    name = f"{DIRECTORY}/attempt-{made.attempt}-step-{made.good_step}.json"
    storage.write_bytes(name, json.dumps(asdict(made)).encode())


def marks(storage: Storage) -> tuple[Mark, ...]:
    """All that there are. One that makes no sense means nothing. Raises OSError."""
    found = []
    for entry in storage.entries(DIRECTORY):
        if not entry.name.endswith(".json"):
            continue
        try:
            found.append(Mark(**json.loads(storage.read_bytes(f"{DIRECTORY}/{entry.name}"))))
        except (FileNotFoundError, ValueError, TypeError):
            continue
    return tuple(found)


def why_bad(checkpoint: Dated, all_marks: Iterable[Mark]) -> str:
    """Why it is no good, in words; "" if it is good."""
    return next((each.why or "the training had gone wrong" for each in all_marks if each.means(checkpoint)), "")
