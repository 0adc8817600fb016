"""How values look to a person: ages, durations, numbers, aligned tables, nearest names. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any


def duration(seconds: float | None) -> str:
    """Two units at most. Example: duration(3725) == "1h02m"."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    seconds = max(0.0, seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def age(seconds: float | None) -> str:
    """One unit, as one says it. Example: age(7300) == "2h ago"."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit} ago"
    return f"{max(0, int(seconds))}s ago"


def number(value: object) -> str:
    """A value in few characters that still tells neighbours apart. Example: number(0.97222) == "0.9722"."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e7:
            return f"{value:.0f}"
        return f"{value:.4g}"
    return str(value)


def size(size_bytes: float | None) -> str:
    """Example: size(1536) == "1.5 KiB"."""
    if size_bytes is None:
        return "-"
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def one_line(value: str, width: int = 100) -> str:
    """`value` on one line of at most `width` characters."""
    flat = " ".join(value.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def printable(value: str) -> str:
    """`value` with nothing in it that could move a terminal's cursor. Example: printable("a\\x1b[2Jb") == "a·[2Jb"."""
    return value if value.isprintable() else "".join(each if each.isprintable() else "·" for each in value)


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> list[str]:
    """Lines of a table in plain text: two blanks between columns, those in `right` flush right, no trailing blanks."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    flush_right = set(right)
    return [
        "  ".join(
            cell.rjust(width) if column in flush_right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def nearest(name: str, known: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The known names that resemble `name`, best first."""
    return tuple(difflib.get_close_matches(name, list(known), n=count, cutoff=0.6))


def did_you_mean(names: Sequence[str]) -> str:
    return f" Did you mean {' or '.join(repr(name) for name in names)}?" if names else ""


def jsonable(value: Any) -> Any:
    """`value` in the types of JSON; NaN and ±inf, which JSON lacks, become the strings "nan", "inf", "-inf"."""
    kind = type(value)
    if kind in (str, int, bool, type(None)):  # most values, and lists of all runs have many
        return value
    if kind is dict:
        return {key if type(key) is str else str(jsonable(key)): jsonable(item) for key, item in value.items()}
    if kind in (list, tuple):
        return [jsonable(item) for item in value]
    import dataclasses
    import datetime
    import enum
    import pathlib
    from collections.abc import Mapping

    if value is None or isinstance(value, bool | int) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, enum.Enum):
        return jsonable(value.value)
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(jsonable(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays, without importing numpy here
        return jsonable(value.tolist())
    if isinstance(value, Iterable):
        return [jsonable(item) for item in value]
    return str(value)
