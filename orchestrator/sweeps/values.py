"""What searchers take and give. Everything here goes into the database as JSON and comes back equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Told(StrEnum):
    """How a trial stands when the searcher hears of it."""

    complete = "complete"
    pruned = "pruned"
    """Ended early, or not yet promoted: the scores are those at `resource`."""
    failed = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """The configuration of a new trial. Example: Suggestion(values={"optim.lr": 0.01}, origin="random", inputs=...)."""

    values: Mapping[str, Any]
    """Dotted key -> value; a conditional key whose condition does not hold is absent and keeps its configured value."""
    origin: str
    """random, grid, point, or the name of the searcher that suggested it."""
    inputs: Mapping[str, Any]
    """All that the suggestion was made from; the same inputs give the same values."""
    token: str = ""
    """What the searcher's own storage calls it, "" where there is none."""

    def to_json(self) -> dict[str, Any]:
        return {
            "values": dict(self.values),
            "origin": self.origin,
            "inputs": dict(self.inputs),
            "token": self.token,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Suggestion:
        return cls(
            values=dict(stored["values"]),
            origin=stored["origin"],
            inputs=dict(stored["inputs"]),
            token=stored.get("token", ""),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Telling:
    """One result that a searcher heard. Example: Telling(seq=7, resource=3.0, scores=(0.91,), state=Told.pruned)."""

    seq: int
    """Number of the decision that recorded it: tellings of all trials are in this order."""
    resource: float
    """Epochs, reports or steps that the trial had had."""
    scores: tuple[float, ...] | None
    """One per objective, as measured; None if the trial failed."""
    state: Told

    def to_json(self) -> dict[str, Any]:
        scores = None if self.scores is None else [stored(score) for score in self.scores]
        return {"seq": self.seq, "resource": self.resource, "scores": scores, "state": str(self.state)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Telling:
        scores: Sequence[float | str] | None = stored["scores"]
        return cls(
            seq=stored["seq"],
            resource=float(stored["resource"]),
            scores=None if scores is None else tuple(map(float, scores)),
            state=Told(stored["state"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """A trial of an earlier life of the sweep, with what its searcher heard about it."""

    number: int
    values: Mapping[str, Any]
    origin: str
    tellings: tuple[Telling, ...] = ()
    seq: int = -1
    """Number of the decision that recorded the suggestion: it is among those of the tellings. -1: not known, before
    all of them."""

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "values": dict(self.values),
            "origin": self.origin,
            "tellings": [telling.to_json() for telling in self.tellings],
            "seq": self.seq,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Past:
        return cls(
            number=stored["number"],
            values=dict(stored["values"]),
            origin=stored["origin"],
            tellings=tuple(map(Telling.from_json, stored["tellings"])),
            seq=stored.get("seq", -1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """Whether a searcher goes on exactly as it would have without the restart, else in words why not."""

    is_exact: bool
    why: str = ""


def stored(score: float) -> float | str:
    """JSON of the database knows neither NaN nor infinity; `float` reads these words back."""
    if math.isfinite(score):
        return score
    return "NaN" if math.isnan(score) else "Infinity" if score > 0 else "-Infinity"
