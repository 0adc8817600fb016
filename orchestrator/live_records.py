"""What watchers see of a run that is going on, and its JSON form: the same in Redis and over HTTP.

Readers trust nobody: what has another shape than it should is left out, never raised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from json.encoder import encode_basestring_ascii
from typing import Any

from orchestrator.status import RunStatus

MOST_KEY_CHARACTERS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveValue:
    """The newest value of one key on one rank. Example: LiveValue(key="loss", rank=0, step=7, time=1.7e9, value=0.1)"""

    key: str
    rank: int
    step: int
    time: float
    """Seconds since 1970, by the clock of whoever logged it."""
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCheckpoint:
    """One of the newest checkpoints."""

    id: str
    uri: str
    state: str
    label: str
    step: int | None
    epoch: int | None
    size_bytes: int | None
    is_best: bool
    time: float
    """When it was told of; seconds since 1970."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveState:
    """How a run goes, in one line."""

    status: RunStatus
    attempt: int
    step: int
    """The highest of this attempt, 0 before the first point."""
    points: int
    """Those that the tracker took since it runs; from the database: all."""
    points_per_second: float
    steps_per_second: float
    """Both over the last seconds; 0 when that is not known."""
    steps: int
    epochs: int
    """How many there will be, by the config; 0 when it does not say."""
    sweep: str
    time: float
    """When something last changed; seconds since 1970, by the tracker's clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """The newest of one run. As an answer to "what changed?" it has the values that did, and checkpoints if they
    did."""

    run: str
    state: LiveState
    values: tuple[LiveValue, ...]
    checkpoints: tuple[LiveCheckpoint, ...]
    """Newest first; a few."""
    source: str
    """redis or database."""
    cursor: str
    """Asks for what changed after this answer."""

    def newest(self, key: str) -> LiveValue | None:
        """Of the lowest rank that has the key."""
        return min((value for value in self.values if value.key == key), key=lambda value: value.rank, default=None)


ROWS = (LiveValue, LiveCheckpoint, LiveState, LiveRun)


# -- to JSON -----------------------------------------------------------------------------------------------------------


def value_json(key: str, rank: int, step: int, time: float, value: float) -> str:
    """A JSON object, written by hand because the tracker makes thousands of them per second."""
    shown = repr(value) if math.isfinite(value) else f'"{value}"'
    moment = repr(time) if math.isfinite(time) else "0.0"
    return f'{{"key":{encode_basestring_ascii(key)},"rank":{rank},"step":{step},"time":{moment},"value":{shown}}}'


def run_document(run: LiveRun) -> dict[str, Any]:
    document = asdict(run) | {"state": state_document(run.state)}
    for value in document["values"]:
        if not math.isfinite(value["value"]):
            value["value"] = str(value["value"])
    return document


def state_document(state: LiveState) -> dict[str, Any]:
    return asdict(state) | {"status": state.status.value}


# -- from JSON ---------------------------------------------------------------------------------------------------------


def run_from(raw: Any) -> LiveRun | None:
    """None for what is no run."""
    state = state_from(raw.get("state")) if isinstance(raw, dict) else None
    if state is None or not all(isinstance(raw.get(name), str) for name in ("run", "source", "cursor")):
        return None
    return LiveRun(
        run=raw["run"], state=state, values=values_from(raw.get("values")), source=raw["source"], cursor=raw["cursor"],
        checkpoints=checkpoints_from(raw.get("checkpoints")),
    )  # fmt: skip


def state_from(raw: Any) -> LiveState | None:
    found = _checked(raw, LiveState)
    try:
        return LiveState(**(found | {"status": RunStatus(found["status"])})) if found else None
    except ValueError:
        return None


def value_from(raw: Any) -> LiveValue | None:
    """None for what is no value."""
    given = raw.get("value") if isinstance(raw, dict) else None
    if given in ("nan", "inf", "-inf"):
        raw = {**raw, "value": float(given)}
    found = _checked(raw, LiveValue)
    return LiveValue(**found) if found and 0 < len(found["key"]) <= MOST_KEY_CHARACTERS else None


def values_from(raw: Any) -> tuple[LiveValue, ...]:
    return tuple(value for each in _items(raw) if (value := value_from(each)) is not None)


def checkpoints_from(raw: Any) -> tuple[LiveCheckpoint, ...]:
    return tuple(LiveCheckpoint(**found) for each in _items(raw) if (found := _checked(each, LiveCheckpoint)))


def loaded(text: str | bytes | None) -> Any:
    """The JSON value, None for what is none."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None


def _items(raw: Any) -> Iterable[Any]:
    return raw if isinstance(raw, list) else ()


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "bool": (bool,), "float": (float, int), "int | None": (int, type(None)),
    "RunStatus": (str,),
}  # fmt: skip
_FIELDS: Mapping[type, tuple[tuple[str, tuple[type, ...]], ...]] = {
    row: tuple((field.name, _KINDS[str(field.type)]) for field in fields(row))
    for row in (LiveValue, LiveCheckpoint, LiveState)
}


def _checked(raw: Any, row: type) -> dict[str, Any]:
    """The fields of `row` if all of them are there and of their kind; else nothing."""
    if type(raw) is not dict:
        return {}
    found = {}
    for name, kinds in _FIELDS[row]:
        value = raw.get(name)
        if type(value) not in kinds:  # not isinstance: True is no number
            return {}
        if kinds[0] is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                return {}
        found[name] = value
    return found
