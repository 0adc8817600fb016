"""record.json: a run's record as text, with the places of its files relative to the run's directory. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.store.errors import BadRecord
from orchestrator.store.names import is_run_id

Record = dict[str, Any]

PROTOCOL = 1
PROTOCOLS = (PROTOCOL, 2)
"""Those that are understood; the second has a sweep's ledger besides."""

PARTS = (
    *("run", "parents", "attempts", "params", "tags", "notes", "events", "checkpoints", "artifacts"),
    *("metrics", "summaries", "producers"),
)

HERE = "./"
"""What a place in the run's own directory begins with."""

_WITH_PLACES = ("checkpoints", "artifacts")

_PASSING = ("directory", "links", "updated_at", "updated_by")
"""Of the run: where it is kept and who looked at it last, not what it is."""
_OF_OTHERS = ("parents", "metrics", "producers", "ledger", "protocol")
"""Depends on what else is in the database."""


def encode(record: Record) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(data: bytes) -> Record:
    """Raises BadRecord for what is none, or of another protocol."""
    try:
        record = json.loads(data)
    except ValueError as error:
        raise BadRecord("record.json", f"{error}.") from error
    if not isinstance(record, dict) or record.get("protocol") not in PROTOCOLS:
        found = record.get("protocol") if isinstance(record, dict) else None
        raise BadRecord("record.json", f"it has protocol {found}, this version speaks {max(PROTOCOLS)}.")
    for part in PARTS:
        kind: type = dict if part == "run" else list
        if not isinstance(record.get(part), kind):
            raise BadRecord("record.json", f"{part} is missing.")
    run = record["run"]
    if not is_run_id(str(run.get("id"))):
        raise BadRecord("record.json", f"{run.get('id')!r} is no id of a run.")
    for name in ("name", "experiment", "directory", "status"):
        if not isinstance(run.get(name), str):
            raise BadRecord("record.json", f"the run's {name} is missing.")
    for part in PARTS[1:]:
        if not all(isinstance(row, dict) for row in record[part]):
            raise BadRecord("record.json", f"{part} has something that is no row.")
    if not all(isinstance(row.get("count"), int) for row in record["summaries"]):
        raise BadRecord("record.json", "a summary has no count.")
    if not all(isinstance(row.get("uri"), str) for part in _WITH_PLACES for row in record[part]):
        raise BadRecord("record.json", "a checkpoint or artifact has no place.")
    return record


def movable(record: Record) -> Record:
    """The record with places in the run's directory relative to it, so that it stays true wherever that is; no password
    of the storage's address is in it."""
    whole = record["run"]["directory"].rstrip("/")
    if not whole:
        return record
    root, _ = _parts(whole)
    roots = {f"{root}/", f"{without_password(root)}/"}

    def relative(row: Mapping[str, Any]) -> dict[str, Any]:
        uri = row["uri"].removeprefix("file://") if root.startswith("/") else _parts(row["uri"])[0]
        inside = next((uri.removeprefix(start) for start in roots if uri.startswith(start)), None)
        return dict(row) if inside is None else {**row, "uri": HERE + inside}

    run = {**record["run"], "directory": without_password(whole)}
    return {**record, "run": run, **{part: [relative(row) for row in record[part]] for part in _WITH_PLACES}}


def _parts(place: str) -> tuple[str, str]:
    """A place and the options of its URL, which come after everything.

    Example: _parts("s3://b/x?region=r") == ("s3://b/x", "?region=r").
    """
    path, mark, options = place.partition("?") if "://" in place else (place, "", "")
    return path.rstrip("/"), mark + options


def without_password(url: str) -> str:
    """As `Storage.uri` tells a place to people. Example: s3://key:secret@bucket/x -> s3://key@bucket/x."""
    return re.sub(r"^([a-z][a-z0-9+.-]*://[^/@:]*):[^/]*@", r"\1@", url)


def placed(record: Record, directory: str) -> Record:
    """The other way round: the record of the run as it lies in `directory`."""

    root, options = _parts(directory)

    def absolute(row: Mapping[str, Any]) -> dict[str, Any]:
        uri = row["uri"]
        return {**row, "uri": f"{root}/{uri.removeprefix(HERE)}{options}"} if uri.startswith(HERE) else dict(row)

    run = {**record["run"], "directory": directory}
    return {**record, "run": run, **{part: [absolute(row) for row in record[part]] for part in _WITH_PLACES}}


def likeness(record: Record) -> str:
    """A hash of what the run is, wherever and beside whatever it is kept."""
    run = {name: value for name, value in record["run"].items() if name not in _PASSING}
    rest = {part: rows for part, rows in movable(record).items() if part not in _OF_OTHERS}
    return hashlib.sha256(json.dumps({**rest, "run": run}, sort_keys=True).encode()).hexdigest()
