"""When would two runs compute the same? Four hashes (config, code, data, environment) and one over them. Pure.

A hash is of what goes in: hosts, drivers and the command line do not count. A part that is not known is empty, and
equal to nothing; but a run without declared datasets has empty data, as every other such run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from orchestrator.config.identity import PARTS, canonical_json, whole_fingerprint


def fingerprint(
    *,
    config_hash: str,
    git: Mapping[str, Any],
    source: Mapping[str, Any],
    datasets: Mapping[str, Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> dict[str, str]:
    """The four parts and `run`, the hash over them. Arguments are the values of a provenance."""
    parts = {
        "config": config_hash,
        "code": code(git, source),
        "data": data(datasets),
        "environment": _hash(environment) if environment.get("packages") else "",
    }
    return {**parts, "run": whole_fingerprint(parts)}


def code(git: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """The archive's content, where there is one; else the commit's tree with what was changed and added.

    The archive comes first: it is the same for a checkout and for a copy without `.git`. What git tracks and the
    archive lacks (too big) counts through the tree and the diff.
    """
    archived, lacks = source.get("sha256", ""), bool(source.get("lacks_tracked"))
    state = [git.get("tree", ""), git.get("diff_sha256", "")]
    if archived and not lacks:
        return _hash({"source": archived})
    if archived:
        return _hash({"source": archived, "git": state})
    # Added files have no hash here, so nothing can be said about them.
    return _hash({"git": state}) if git.get("tree") and not git.get("untracked") else ""


def data(datasets: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the declared datasets; empty without any. Where one has a fingerprint its address does not count: it may be
    mounted elsewhere."""
    if not datasets:
        return ""
    seen = {}
    for key, dataset in datasets.items():
        names = ("fingerprint", "version") if dataset.get("fingerprint") else ("uri", "version", "size")
        seen[key] = {name: dataset.get(name) or "" for name in names}
    return _hash(seen)


def complete(stored: Mapping[str, Any], config_hash: str = "") -> dict[str, str]:
    """All five, from what a provenance holds under `fingerprint` (nothing, in an attempt that was never described)."""
    parts = {name: str(stored.get(name) or "") for name in PARTS}
    parts["config"] = parts["config"] or config_hash
    return {**parts, "run": whole_fingerprint(parts)}


def different(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Each part as `same`, `differs` or `unknown`, for two results of `complete`."""
    return {part: _compared(part, a.get(part, ""), b.get(part, "")) for part in PARTS}


def _compared(part: str, a: str, b: str) -> str:
    if a == b and (a or part == "data"):
        return "same"
    return "differs" if (a and b) or part == "data" else "unknown"


def _hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
