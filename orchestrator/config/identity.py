"""When are two configurations the same, and where do they differ?

Numbers are compared by value: 1 and 1.0 are one number, true and 1 are not. Keys have no order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from orchestrator.config.settings import NO_WORK_BY_DEFAULT, NOT_WORK
from orchestrator.config.typed import dump


class Absent(Enum):
    """What a key without a value has."""

    absent = "(not set)"

    def __str__(self) -> str:
        return self.value


ABSENT = Absent.absent


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One dotted key whose value differs. Example: Change(key="optim.lr", old=0.1, new=ABSENT)."""

    key: str
    old: Any
    new: Any


def flatten(values: Mapping[str, Any], *, key: str = "") -> dict[str, Any]:
    """Dotted key -> leaf. Lists, and mappings with nothing in them, are leaves."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        full = f"{key}.{name}" if key else str(name)
        if isinstance(value, Mapping) and value:
            found |= flatten(value, key=full)
        else:
            found[full] = dict(value) if isinstance(value, Mapping) else value
    return found


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What changed from one configuration to the other, by key."""
    before, after = flatten(old), flatten(new)
    changes = []
    for key in sorted({*before, *after}):
        a, b = before.get(key, ABSENT), after.get(key, ABSENT)
        if a is ABSENT or b is ABSENT or canonical_json(a) != canonical_json(b):
            changes.append(Change(key=key, old=a, new=b))
    return changes


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces, ASCII, whole floats as integers, NaN and ±inf as text."""
    return json.dumps(_canonical(dump(value)), sort_keys=True, separators=(",", ":"), allow_nan=False)


def config_hash(resolved: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the keys that say what is computed; `settings.NOT_WORK` names the others."""
    work = {name: value for name, value in resolved.items() if name not in NOT_WORK}
    for dotted in NOT_WORK:
        group, _, name = dotted.partition(".")
        if name and isinstance(work.get(group), Mapping):
            work[group] = {key: value for key, value in work[group].items() if key != name}
    for dotted, default in NO_WORK_BY_DEFAULT.items():
        group, _, name = dotted.partition(".")
        section = work.get(group)
        if isinstance(section, Mapping) and name in section and _canonical(section[name]) == _canonical(default):
            work[group] = {key: value for key, value in section.items() if key != name}
            if not work[group]:
                del work[group]
    return hashlib.sha256(canonical_json(work).encode()).hexdigest()


PARTS = ("config", "code", "data", "environment")
"""What a run is made of; each has a hash, see orchestrator/provenance/fingerprint.py."""


def whole_fingerprint(parts: Mapping[str, str]) -> str:
    """SHA-256 (hex) over the hashes of all parts; empty while one is unknown. A run may have no data to name."""
    if not all(parts.get(name) for name in PARTS if name != "data"):
        return ""
    return hashlib.sha256(" ".join(f"{name}={parts.get(name, '')}" for name in PARTS).encode()).hexdigest()


def json_number(value: float) -> float | str:
    """A float as strict JSON can hold it: `.nan`, `.inf` and `-.inf`, as YAML writes them, for what JSON cannot."""
    if math.isnan(value):
        return ".nan"
    return value if math.isfinite(value) else (".inf" if value > 0 else "-.inf")


def _canonical(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else json_number(value)
    if isinstance(value, dict):
        return {name: _canonical(item) for name, item in value.items()}
    return [_canonical(item) for item in value] if isinstance(value, list) else value
