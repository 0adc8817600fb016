"""What every benchmark says: rows of what was promised and what was measured, as a table and as a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the answer. `required` None: measured to be known, promised to nobody."""

    bar: str
    measured: float
    required: float | None = None
    holds: bool | None = None
    unit: str = ""


def at_most(bar: str, measured: float, required: float, unit: str = "") -> Row:
    return Row(bar=bar, measured=measured, required=required, holds=measured <= required, unit=unit)


def at_least(bar: str, measured: float, required: float, unit: str = "") -> Row:
    return Row(bar=bar, measured=measured, required=required, holds=measured >= required, unit=unit)


def printed(bar: str, measured: float, unit: str = "") -> Row:
    return Row(bar=bar, measured=measured, unit=unit)


def save(name: str, rows: Sequence[Row]) -> None:
    """Rows of an earlier call stay, unless these replace them: parts of a long benchmark can be run on their own."""
    BUILD.mkdir(parents=True, exist_ok=True)
    kept = {row.bar: row for row in load(name)} | {row.bar: row for row in rows}
    _file(name).write_text(json.dumps([asdict(row) for row in kept.values()], indent=2) + "\n")


def load(name: str) -> list[Row]:
    return [Row(**row) for row in json.loads(_file(name).read_text())] if _file(name).exists() else []


def run(name: str, parts: Mapping[str, Callable[[], Iterable[Row]]], wanted: Sequence[str], *, is_whole: bool) -> int:
    """Runs those parts, each with its table and its rows in the file, and gives the exit code: 1 if a bar is missed.

    `is_whole`: the file begins anew, for rows of an earlier run that this one does not have would stay.
    """
    if is_whole:
        _file(name).unlink(missing_ok=True)
    holds = True
    for part in wanted:
        found: list[Row] = []
        try:
            for row in parts[part]():  # row by row: what was measured before an interruption is kept
                found.append(row)
        finally:
            save(name, found)
        print(f"\n{part}\n{table(found)}", flush=True)
        holds = holds and all(row.holds is not False for row in found)
    print(f"\nbars\n{table([row for row in load(name) if row.required is not None])}", flush=True)
    return 0 if holds else 1


def _file(name: str) -> Path:
    return BUILD / f"{name}.json"


def table(rows: Sequence[Row]) -> str:
    return "\n".join(_line(row) for row in rows)


def _line(row: Row) -> str:
    value = f"{row.measured:>14,.4g}" if row.measured < 1000 else f"{row.measured:>14,.0f}"
    said = ""
    if row.required is not None:
        said = f"   bar {row.required:,.6g}: {'holds' if row.holds else 'MISSED'}"
    return f"{value} {row.unit:<9} {row.bar}{said}"
