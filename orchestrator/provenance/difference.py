"""What differs between two attempts, from their provenances. Pure; `orc diff` shows it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.config import ABSENT, Change, diff

MAX_LINES = 200
"""Of the unified diff of one file."""


def package_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """added, removed (name -> version) and changed (name -> [old, new])."""
    old, new = _mapping(a, "packages"), _mapping(b, "packages")
    return {
        "added": {name: new[name] for name in sorted(new.keys() - old.keys())},
        "removed": {name: old[name] for name in sorted(old.keys() - new.keys())},
        "changed": {name: [old[name], new[name]] for name in sorted(old.keys() & new.keys()) if old[name] != new[name]},
    }


def code_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Commit, branch, remote, what was changed on top of the commit, and the archived source."""
    return diff(_code(a), _code(b))


def _code(provenance: Mapping[str, Any]) -> dict[str, Any]:
    git, source = _mapping(provenance, "git"), _mapping(provenance, "source")
    named = {name: git[name] for name in ("commit", "branch", "remote", "is_dirty") if git.get(name) not in (None, "")}
    for name, value in (("diff", git.get("diff_sha256")), ("source", source.get("sha256"))):
        if value:
            named[name] = str(value)[:12]
    return named


def system_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Python, CUDA, driver, container, hosts, devices, resources, seed, command, working directory."""
    return diff(_system(a), _system(b))


def _system(provenance: Mapping[str, Any]) -> dict[str, Any]:
    ranks = [rank for rank in _mapping(provenance, "ranks").values() if isinstance(rank, Mapping)]
    several = {
        "ranks.hosts": sorted({str(rank["host"]) for rank in ranks if rank.get("host")}),
        "ranks.devices": sorted(str(rank["device_name"]) for rank in ranks if rank.get("device_name")),
        "ranks.drivers": sorted({str(rank["driver"]) for rank in ranks if rank.get("driver")}),
        "ranks.cuda": sorted({str(rank["cuda"]) for rank in ranks if rank.get("cuda")}),
        "ranks.cudnn": sorted({str(rank["cudnn"]) for rank in ranks if rank.get("cudnn")}),
    }
    container = {k: v for k, v in _mapping(provenance, "container").items() if k not in ("id", "kubernetes")}
    single = ("python", "implementation", "platform", "host", "cpus", "memory_bytes", "seed", "command", "directory")
    return {
        **{name: provenance[name] for name in single if name in provenance},
        **{name: values for name, values in several.items() if values},
        **({"ranks.count": len(ranks)} if ranks else {}),
        **({"cuda": cuda} if (cuda := _mapping(provenance, "cuda")) else {}),
        **({"container": container} if container else {}),
        **({"resources": _steady(resources)} if (resources := _mapping(provenance, "resources")) else {}),
    }


def _steady(resources: Mapping[str, Any]) -> dict[str, Any]:
    """Without names of nodes, which are new in each cluster."""
    steady = dict(resources)
    if isinstance(nodes := steady.get("nodes"), Sequence) and not isinstance(nodes, str):
        kept = [
            {k: v for k, v in node.items() if k not in ("id", "node", "name")}
            for node in nodes
            if isinstance(node, Mapping)
        ]
        steady["nodes"] = sorted(kept, key=repr)
    return steady


def data_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Declared datasets."""
    return diff(_mapping(a, "datasets"), _mapping(b, "datasets"))


def file_changes(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, list[str]]:
    """added, removed and changed names, of two archives' digests."""
    return {
        "added": sorted(b.keys() - a.keys()),
        "removed": sorted(a.keys() - b.keys()),
        "changed": sorted(name for name in a.keys() & b.keys() if a[name] != b[name]),
    }


def patch(name: str, old: str | None, new: str | None, *, most: int = MAX_LINES) -> list[str]:
    """Lines of a unified diff; None is a file that is no text, an empty text one that is not there."""
    if old is None or new is None:
        return [f"{name}: no text"]
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), f"a/{name}", f"b/{name}", lineterm="", n=2)
    shown = [line for line, _ in zip(lines, range(most + 1), strict=False)]
    return shown if len(shown) <= most else [*shown[:most], f"… more than {most} lines"]


def change_documents(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """As plain values: what a side lacks has no `a` or no `b`."""
    return [
        {"key": row.key, **{side: value for side, value in (("a", row.old), ("b", row.new)) if value is not ABSENT}}
        for row in changes
    ]


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return found if isinstance(found := values.get(name), Mapping) else {}
