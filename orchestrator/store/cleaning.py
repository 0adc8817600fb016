"""Makes anything a user logs fit for PostgreSQL, which takes no NUL, no lone surrogate and, in JSON, no NaN."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MAX_NAME_BYTES = 500
"""Names stand in B-tree indexes, whose entries have at most 2.7 kB."""

MAX_DEPTH = 60
"""Deeper JSON is kept as text."""


def clean_text(value: Any) -> str:
    """Without NUL; lone surrogates become question marks."""
    return str(value).replace("\0", "").encode("utf-8", "replace").decode()


def clean_name(value: Any) -> str:
    """A text that fits into an index; what is too long ends in a hash of the whole."""
    name = clean_text(value)
    raw = name.encode()
    if len(raw) <= MAX_NAME_BYTES:
        return name
    return f"{raw[: MAX_NAME_BYTES - 20].decode(errors='ignore')}~{hashlib.sha256(raw).hexdigest()[:16]}"


def clean_json(value: Any, depth: int = 0) -> Any:
    """The value as JSON that jsonb takes: NaN and ±inf are the strings NaN, Infinity, -Infinity."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else number_text(value)
    if isinstance(value, str):
        return clean_text(value)
    if depth >= MAX_DEPTH:
        return clean_text(repr(value))
    if isinstance(value, Mapping):
        return {clean_text(key): clean_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [clean_json(item, depth + 1) for item in value]
    return clean_text(value)


def json_text(value: Any) -> str:
    return json.dumps(clean_json(value), ensure_ascii=False)


def number_text(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def typed(value: Any) -> tuple[str, Any, float | None]:
    """Type, JSON value and number (for comparing) of a parameter. Example: typed(3) == ("int", 3, 3.0)."""
    value = clean_json(value) if not isinstance(value, float) else value
    match value:
        case None:
            return "null", None, None
        case bool():
            return "bool", value, float(value)
        case int():
            return "int", value, _as_float(value)
        case float():
            return "float", clean_json(value), value
        case str():
            return "str", value, None
        case dict():
            return "dict", value, None
        case _:
            return "list", value, None


def _as_float(value: int) -> float | None:
    try:
        return float(value)
    except OverflowError:
        return None


def untyped(kind: str, value: Any) -> Any:
    """What `typed` was given."""
    return float(value) if kind == "float" else value
