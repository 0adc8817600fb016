"""`latest.json`, `best.json`, `best-2.json` …: small files beside the checkpoints that name one of them.

They are hints for people and other programs and may lag behind; what exists, the directories say (see catalog.py).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.catalog import age_key, is_name
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.manifest import PROTOCOL, Manifest, finite
from orchestrator.checkpoints.policy import Direction

_WHICH = re.compile(r"latest|best|best-[1-9]\d*")

logger = logging.getLogger(__name__)


def update(storage: Storage, committed: Sequence[Manifest], rules: KeepRules, *, now: float) -> None:
    """Lets the pointers follow `committed`, whose order does not matter. Each is replaced in one step, or left when it
    is right already, or removed when there is nothing to point to. A storage that fails costs a warning."""
    try:
        _point(storage, "latest", max(committed, key=lambda one: age_key(one.name), default=None), None, now)
        for number, rule in enumerate(rules.best, start=1):
            _point(storage, "best" if number == 1 else f"best-{number}", _best(committed, rule), rule, now)
    except OSError as error:
        logger.warning("checkpoint pointers not updated", extra={"storage": storage.uri(), "why": str(error)})


def read(storage: Storage, which: str) -> str | None:
    """The name that `latest`, `best`, `best-2` … point to; None if there is no such pointer or it makes no sense."""
    name = (_read(storage, which) or {}).get("name")
    return name if isinstance(name, str) and is_name(name) else None


def _point(storage: Storage, which: str, target: Manifest | None, rule: BestRule | None, now: float) -> None:
    if target is None:
        storage.delete(f"{which}.json")
        return
    metric = rule.metric if rule else ""
    value = finite({metric: target.metrics[metric]})[metric] if metric else None
    content = {
        "protocol": PROTOCOL, "name": target.name, "step": target.step, "metric": metric, "value": value,
        "manifest_sha256": target.digest,
    }  # fmt: skip
    before = _read(storage, which)
    if before is not None and {key: before.get(key) for key in content} == content:
        return
    storage.write_bytes(f"{which}.json", json.dumps({**content, "at": now}, allow_nan=False).encode())


def _best(committed: Sequence[Manifest], rule: BestRule) -> Manifest | None:
    """Of equal ones the newer."""
    if not rule.metric:
        return max((one for one in committed if one.is_best), key=lambda one: age_key(one.name), default=None)
    sign = 1.0 if rule.direction == Direction.max else -1.0
    measured = [one for one in committed if not math.isnan(one.metrics.get(rule.metric, math.nan))]
    return max(measured, key=lambda one: (sign * one.metrics[rule.metric], age_key(one.name)), default=None)


def _read(storage: Storage, which: str) -> dict[str, Any] | None:
    if not _WHICH.fullmatch(which):
        return None
    try:
        raw = json.loads(storage.read_bytes(f"{which}.json"))
    except (FileNotFoundError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None
