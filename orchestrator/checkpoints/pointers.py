"""`latest.json`, `best.json`, `best-2.json` …: small files beside the checkpoints that name one of them.

They are hints for people and other programs and may lag behind; what exists, the directories say (see catalog.py).
Our own readers take no name from them, only by which metric "best" is meant.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints.catalog import age_key, is_name
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.manifest import PROTOCOL, Manifest, finite
from orchestrator.checkpoints.policy import Direction
from orchestrator.checkpoints.retention import ranked

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


def best_first(storage: Storage, which: str, newest_first: Sequence[Manifest]) -> list[Manifest]:
    """Those that `best`, `best-2` … mean, best first; `newest_first` is what there is. The pointer says by which metric
    they are compared, and need not point to what is best now: a crash or a deletion may have come before it moved.

    Where there is no pointer, or one without a metric, `best` means those that were saved with `best=True` or as an
    improvement, newest first.
    """
    raw = _read(storage, which)
    if raw is None and which != "best":
        return []
    metric, direction = (raw or {}).get("metric"), (raw or {}).get("direction")
    if isinstance(metric, str) and metric and direction in tuple(Direction):
        measured = ranked(newest_first, BestRule(metric=metric, direction=Direction(direction)))
        if measured:
            return measured
    return [manifest for manifest in newest_first if manifest.is_best]


def _point(storage: Storage, which: str, target: Manifest | None, rule: BestRule | None, now: float) -> None:
    if target is None:
        storage.delete(f"{which}.json")
        return
    metric = rule.metric if rule else ""
    value = finite({metric: target.metrics[metric]})[metric] if metric else None
    content = {
        "protocol": PROTOCOL, "name": target.name, "step": target.step, "metric": metric, "value": value,
        "direction": rule.direction.value if metric and rule else "", "manifest_sha256": target.digest,
    }  # fmt: skip
    before = _read(storage, which)
    if before is not None and {key: before.get(key) for key in content} == content:
        return
    data = json.dumps({**content, "at": now}, allow_nan=False).encode()
    storage.write_bytes(f"{which}.json", data, is_durable=False)  # a hint; the next commit gives it anew


def _best(committed: Sequence[Manifest], rule: BestRule) -> Manifest | None:
    """Of equal ones the newer."""
    if not rule.metric:
        return max((one for one in committed if one.is_best), key=lambda one: age_key(one.name), default=None)
    newest_first = sorted(committed, key=lambda one: age_key(one.name), reverse=True)
    return next(iter(ranked(newest_first, rule)), None)


def _read(storage: Storage, which: str) -> dict[str, Any] | None:
    if not _WHICH.fullmatch(which):
        return None
    try:
        raw = json.loads(storage.read_bytes(f"{which}.json"))
    except (FileNotFoundError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None
