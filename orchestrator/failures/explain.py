"""A failure in five lines that a tired person understands: what, where, why, what was done, where the log is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def five_lines(error: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and texts from an attempt's stored error; what is not known is left out."""
    message = str(error.get("message") or "").strip()
    first = message.splitlines()[0] if message else ""
    kind = str(error.get("kind") or "").replace("_", " ")
    what = str(error.get("what") or ": ".join(filter(None, [str(error.get("type") or ""), first])))
    lines = [
        ("what", f"{kind}: {what}" if kind and kind != "unknown" else what),
        ("where", _where(error)),
        ("why", str(error.get("hint") or "")),
        ("done", str(error.get("done") or "")),
        ("log", str(error.get("log") or "")),
    ]
    return [(name, text) for name, text in lines if text]


def headline(error: Mapping[str, Any]) -> str:
    """What and where, in one line."""
    lines = dict(five_lines(error))
    what = lines.get("what", "it failed")
    return f"{what} ({lines['where']})" if "where" in lines else what


def _where(error: Mapping[str, Any]) -> str:
    rank, host, step = error.get("rank"), error.get("host"), error.get("step")
    parts = []
    if rank is not None:
        parts.append("the driver" if rank < 0 else f"rank {rank}")
    if host:
        parts.append(f"host {host}")
    if step is not None:
        parts.append(f"step {step}")
    return ", ".join(parts)
