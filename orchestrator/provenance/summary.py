"""An attempt's provenance in two lines, for `orc show`. Pure, and light to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def code_line(provenance: Mapping[str, Any]) -> str:
    """`main a1b2c3d4e5f6, 3 changed, 1 untracked`; without git what the archive is called; empty without either."""
    git, source = (_mapping(provenance, name) for name in ("git", "source"))
    if not git.get("commit"):
        return f"source {sha[:12]} (no git)" if (sha := str(source.get("sha256", ""))) else ""
    changed, untracked = (int(git.get(f"{name}_files") or 0) for name in ("changed", "untracked"))
    dirty = f"{changed} changed" if changed else "changed" if git.get("is_dirty") else ""
    new = f"{untracked} untracked" if untracked else ""
    where = f"{git.get('branch') or '(detached)'} {str(git['commit'])[:12]}"
    return ", ".join(part for part in (where, dirty, new) if part)


def fingerprint_line(provenance: Mapping[str, Any]) -> str:
    """`1a2b3c4d5e6f = config … code … data … environment …`; empty where none is recorded."""
    found = _mapping(provenance, "fingerprint")
    if not found:
        return ""
    parts = (
        f"{part} {str(found.get(part) or '')[:8] or ('none' if part == 'data' else 'unknown')}"
        for part in ("config", "code", "data", "environment")
    )
    return f"{str(found.get('run') or '')[:12] or 'unknown'} = {', '.join(parts)}"


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return found if isinstance(found := values.get(name), Mapping) else {}
