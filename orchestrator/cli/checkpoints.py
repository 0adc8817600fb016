"""`orc checkpoint`: what there is, whether its bytes are right, a copy in another form, pins, the index.

What deletes is in checkpoint_removal.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.account import user_name
from orchestrator.cli import text
from orchestrator.cli.access import asked_catalog
from orchestrator.cli.checkpoint_places import NoCheckpoint, Place, Places, Unreachable, is_directory
from orchestrator.cli.keep_rules import from_config
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.cli.patience import Patience
from orchestrator.errors import CheckpointCorrupt, ConfigError, UserError
from orchestrator.stack import Stack

if TYPE_CHECKING:
    from orchestrator.checkpoints.catalog import Found, Hold
    from orchestrator.checkpoints.job import KeepRules
    from orchestrator.checkpoints.manifest import Manifest
    from orchestrator.store.views import CheckpointRow

COMMITTED = "committed"
ENDINGS = {"pt": ".pt", "safetensors": ".safetensors", "dcp": ""}


# -- ls ----------------------------------------------------------------------------------------------------------------


def ls(arguments: argparse.Namespace, output: Output) -> int:
    """From the index, newest first; of a directory, from what lies there."""
    now = time.time()
    with Patience(output, "looking"):
        rows = _rows_there(arguments, now) if is_directory(arguments.run) else _rows_listed(arguments, now)

    def render() -> None:
        if not rows:
            output.line("no checkpoints")
            return
        cells = [_cells(row, now) for row in rows]
        header = ("name", "step", "epoch", "state", "size", "age", "saved because", "kept because", "")
        output.table(header, cells, right=(1, 2, 4), optional=("saved because", "epoch"))

    output.result(rows, render)
    return 0


def _rows_listed(arguments: argparse.Namespace, now: float) -> list[dict[str, Any]]:
    with asked_catalog(arguments) as catalog:
        run = catalog.run(arguments.run)
        listed = list(reversed(catalog.checkpoints(run.run)))
    committed = [row for row in listed if row.state == COMMITTED]
    held = {} if arguments.api else _held(run.directory, committed, now)
    kept = _kept([_found(row, held) for row in committed], from_config(run.config), now)
    return [
        {
            **text.jsonable(row), "name": _name(row), "kept_because": list(kept.get(_name(row), ())),
        }
        for row in listed
        if arguments.all or row.state not in ("deleted", "quarantined")
    ]  # fmt: skip


def _rows_there(arguments: argparse.Namespace, now: float) -> list[dict[str, Any]]:
    from orchestrator.checkpoints.index import row_of

    with Places(arguments.home) as places:
        place, _ = places.find(arguments.run)
        scan = place.scan()
    rows = []
    for found in scan.found:
        name = found.manifest.name
        row = {"run": found.manifest.run, **row_of(found, place.storage.uri(name)), "name": name}
        rows.append(text.jsonable(row | {"kept_because": _words(found.holds)}))
    if arguments.all:
        rows += [_bare(place, name, "damaged", str(error)) for name, error in scan.corrupt]
        rows += [_bare(place, name, "unfinished", "") for name in scan.incomplete]
    return rows


def _bare(place: Place, name: str, state: str, why: str) -> dict[str, Any]:
    return {"name": name, "uri": place.storage.uri(name), "state": state, "why": why}


def _name(row: CheckpointRow) -> str:
    return row.id.rpartition("/")[2]


def _words(holds: Iterable[Hold]) -> list[str]:
    """As `retention.kept` calls them."""
    return sorted(hold.name.replace("_", " ") for hold in holds)


def _held(directory: str, rows: Sequence[CheckpointRow], now: float) -> dict[str, frozenset[Hold]]:
    """What the storage says that the index does not know: who reads one just now. Asked of local directories only: a
    list must not wait for an object store."""
    from orchestrator.backends.storage import Storage
    from orchestrator.checkpoints import catalog

    if not directory or "://" in directory:
        return {}
    root = Storage(directory).join(catalog.DIRECTORY)
    held = {}
    for row in rows:
        with suppress(OSError, UserError):
            held[_name(row)] = catalog.holds(root, _name(row), now=now)
    return held


def _found(row: CheckpointRow, held: Mapping[str, frozenset[Hold]]) -> Found:
    """As much of a checkpoint as the rules of retention look at."""
    from orchestrator.checkpoints.catalog import Found, Hold
    from orchestrator.checkpoints.manifest import Manifest

    return Found(
        manifest=Manifest(
            run=row.run, name=_name(row), attempt=row.attempt, step=row.step or 0, epoch=row.epoch or 0,
            epoch_complete=False, world_size=row.world_size or 1, seed=0, config_hash="", created=row.created,
            duration=row.duration or 0.0, files=(), is_best=row.is_best, resumable=row.resumable,
            metrics=_numbers(row.metrics),
        ),
        holds=held.get(_name(row), frozenset())
        | ({Hold.pinned} if row.is_pinned else set())
        | ({Hold.registered} if row.is_registered else set()),
    )  # fmt: skip


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """JSON has NaN and infinities as strings; what is no number at all measures nothing."""
    numbers = {}
    for key, value in metrics.items():
        with suppress(TypeError, ValueError):
            numbers[key] = float(value)
    return numbers


def _kept(checkpoints: Sequence[Found], rules: KeepRules | None, now: float) -> dict[str, tuple[str, ...]]:
    """Nothing where the names are not ours; no more than what holds them where the run's rules are not known."""
    from orchestrator.checkpoints import catalog, retention

    ours = [found for found in checkpoints if catalog.is_name(found.manifest.name)]
    if rules is None:
        return {found.manifest.name: tuple(_words(found.holds)) for found in ours}
    return retention.kept(ours, rules, now=now)


def _cells(row: dict[str, Any], now: float) -> tuple[str, ...]:
    if "created" not in row:
        return (row["name"], "-", "-", row["state"], "-", "-", "", text.one_line(row["why"], 60), "")
    marks = ("best", row.get("is_best")), ("pinned", row.get("is_pinned")), ("weights", not row.get("resumable", True))
    return (
        row["name"],
        text.number(row["step"]),
        text.number(row["epoch"]),
        row["state"],
        text.size(row["size_bytes"]),
        text.age(now - row["created"]),
        ", ".join(row.get("reasons") or ()),
        ", ".join(row["kept_because"]) if row["state"] == COMMITTED else "",
        " ".join([*(mark for mark, is_set in marks if is_set), row.get("label") or ""]).strip(),
    )


# -- show --------------------------------------------------------------------------------------------------------------


def show(arguments: argparse.Namespace, output: Output) -> int:
    """From the checkpoint itself, not from the index."""
    with Places(arguments.home) as places, Patience(output, "looking"):
        place, name = places.find(arguments.checkpoint)
        found = place.chosen(place.scan(), name)
    manifest, uri = found.manifest, place.storage.uri(found.manifest.name)
    holds = _words(found.holds)
    whole = json.loads(manifest.encode())
    document = {
        **whole, "id": manifest.id, "uri": uri, "size_bytes": manifest.size_bytes, "holds": holds,
    }  # fmt: skip

    def render() -> None:
        output.line(manifest.id, style="bold")
        output.fields(_facts(manifest, uri, holds))
        output.line()
        rows = [(file.path, text.size(file.size_bytes), str(len(file.tensors) or "")) for file in manifest.files]
        output.table(("file", "size", "tensors"), rows, right=(1, 2), title="files")
        output.line()
        output.line(f"next: orc checkpoint verify {place.reference}@{manifest.name}")

    output.result(document, render)
    return 0


def _facts(manifest: Manifest, uri: str, holds: Sequence[str]) -> list[tuple[str, str]]:
    metrics = (f"{key}={text.number(value)}" for key, value in sorted(manifest.metrics.items()))
    speed = manifest.timings.get("write_bytes_per_second")
    seconds = (f"{key} {text.duration(value)}" for key, value in manifest.timings.items() if key in ("copy", "write"))
    encryption = f"{manifest.cipher}, key {manifest.key_id}" if manifest.cipher else ""
    return [
        ("where", uri),
        ("step", str(manifest.step)),
        ("epoch", f"{manifest.epoch}{', complete' if manifest.epoch_complete else ''}"),
        ("label", manifest.label),
        ("saved", text.age(time.time() - manifest.created)),
        ("because", ", ".join(manifest.reasons)),
        ("kind", manifest.kind + ("" if manifest.resumable else ", training cannot go on from it")),
        ("best", "yes" if manifest.is_best else ""),
        ("held by", ", ".join(holds)),
        ("attempt", str(manifest.attempt)),
        ("workers", str(manifest.world_size)),
        ("size", text.size(manifest.size_bytes)),
        ("took", ", ".join((f"{text.duration(manifest.duration)} until durable", *seconds))),
        ("speed", f"{text.size(speed)}/s" if speed else ""),
        ("metrics", "  ".join(metrics)),
        ("versions", "  ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))),
        ("config", manifest.config_hash[:12]),
        ("cipher", encryption),
        ("sha256", manifest.digest),
    ]


# -- verify ------------------------------------------------------------------------------------------------------------


def verify(arguments: argparse.Namespace, output: Output) -> int:
    """Reads every byte and changes nothing. Exit code 1 on damage."""
    with Places(arguments.home) as places, Patience(output, "looking"):
        place, name = places.find(arguments.checkpoint)
        if arguments.all and name:
            raise UsageError("give a RUN with --all, or RUN@NAME without it.")
        scan = place.scan()
        corrupt = [(each, error) for each, error in scan.corrupt if arguments.all or each == name]
        wanted = list(scan.found) if arguments.all else [] if corrupt else [place.chosen(scan, name)]
    with Patience(output, "reading") as patience:
        checked = []
        for found in wanted:
            with suppress(NoCheckpoint) if arguments.all else nullcontext():  # a run that goes on deletes old ones
                checked.append(_checked(place, found.manifest, patience))
    checked += [_unreadable(place, each, error) for each, error in corrupt]
    is_sound = not any(each["damages"] for each in checked)

    def render() -> None:
        if not checked:
            output.line(f"{place.title} has no checkpoints")
        for each in checked:
            if each["damages"]:
                output.line(f"{each['name']}: damaged", style="red")
                for damage in each["damages"]:
                    output.line(f"    {damage['what']}")
            else:
                rate = each["size_bytes"] / max(each["seconds"], 1e-9)
                what = f"{each['files']} files, {text.size(each['size_bytes'])}, {text.size(rate)}/s"
                output.line(f"{each['name']}: every byte is as it was written ({what})")
        if not is_sound:
            output.line("A run that goes on sets these aside and takes the next older one; nothing was changed now.")

    output.result({"is_sound": is_sound, "checkpoints": checked}, render)
    return 0 if is_sound else 1


def _checked(place: Place, manifest: Manifest, patience: Patience) -> dict[str, Any]:
    from orchestrator.checkpoints import reader

    begun = time.monotonic()

    def progress(done_bytes: int, total_bytes: int) -> None:
        patience.bytes(manifest.name, done_bytes, total_bytes)

    try:
        with place.in_use(manifest.name):
            damages = reader.verify(place.storage.join(manifest.name), manifest, progress=progress)
    except OSError as error:
        raise Unreachable(place.storage.uri(manifest.name), error.strerror or str(error)) from error
    return {
        "name": manifest.name, "uri": place.storage.uri(manifest.name), "files": len(manifest.files),
        "size_bytes": manifest.size_bytes, "seconds": time.monotonic() - begun,
        "damages": [
            {
                "file": each.file, "tensor": each.tensor, "expected": each.expected, "found": each.found,
                "what": str(each),
            }
            for each in damages
        ],
    }  # fmt: skip


def _unreadable(place: Place, name: str, error: CheckpointCorrupt) -> dict[str, Any]:
    damage = {"file": error.file, "tensor": "", "expected": error.expected, "found": error.found}
    what = f"{error.file}: {error.found}, expected was {error.expected}"
    return {"name": name, "uri": place.storage.uri(name), "damages": [{**damage, "what": what}]}


# -- export ------------------------------------------------------------------------------------------------------------


def export(arguments: argparse.Namespace, output: Output) -> int:
    with Places(arguments.home) as places, Patience(output, "looking"):
        place, name = places.find(arguments.checkpoint)
        manifest = place.chosen(place.scan(), name).manifest
        title = place.run.name if place.run else "checkpoint"
    target = Path(arguments.output or f"{title}-{manifest.name}{ENDINGS[arguments.format]}")
    if target.exists():
        raise UserError(f"{target} exists already. Choose another --output, or remove it.")
    if not target.absolute().parent.is_dir():
        raise UserError(f"{target.absolute().parent} is no directory. Make it first, or choose another --output.")
    with Patience(output, f"writing {target} ({text.size(manifest.size_bytes)})"):
        _write(place, manifest, arguments.format, target)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) if target.is_dir() else 0
    document = {
        "path": str(target), "format": arguments.format, "checkpoint": manifest.id, "step": manifest.step,
        "size_bytes": size or target.stat().st_size,
    }  # fmt: skip
    output.result(
        document, lambda: output.line(f"{target}: {manifest.id}, {text.size(document['size_bytes'])}")
    )  # fmt: skip
    return 0


def _write(place: Place, manifest: Manifest, form: str, target: Path) -> None:
    from orchestrator.checkpoints import export as exports  # imports torch: seconds

    write = {"pt": exports.to_pt, "dcp": exports.to_dcp, "safetensors": exports.to_safetensors}[form]
    try:
        with place.in_use(manifest.name):
            write(place.storage.join(manifest.name), manifest, target)
    except CheckpointCorrupt as error:
        raise UserError(
            f"{error.file} in {error.uri} is damaged: {error.found}, the manifest says {error.expected}. Nothing was "
            f"written. `orc checkpoint ls {place.reference}` shows older ones."
        ) from error
    except OSError as error:
        raise UserError(f"{target} could not be written from {place.storage.uri(manifest.name)}: {error}") from error


# -- pin, unpin --------------------------------------------------------------------------------------------------------


def pin(arguments: argparse.Namespace, output: Output) -> int:
    return _pin(arguments, output, pinned=True)


def unpin(arguments: argparse.Namespace, output: Output) -> int:
    return _pin(arguments, output, pinned=False)


def _pin(arguments: argparse.Namespace, output: Output, *, pinned: bool) -> int:
    """The mark in storage first, because that is what counts; then the index."""
    from orchestrator.checkpoints import catalog
    from orchestrator.checkpoints.catalog import Hold

    with Places(arguments.home) as places:
        place, name = places.find(arguments.checkpoint)
        if not name:
            raise UsageError(f"say which: RUN@NAME, for example {place.reference}@latest.")
        manifest = place.chosen(place.scan(), name).manifest
        try:
            if pinned:
                catalog.hold(place.storage, manifest.name, Hold.pinned)
            else:
                catalog.release(place.storage, manifest.name, Hold.pinned)
        except OSError as error:
            raise Unreachable(place.storage.uri(manifest.name), error.strerror or str(error)) from error
        if place.run is not None:
            places.store.pin_checkpoint(
                place.run.run, manifest.id, pinned, user=user_name(), now=time.time()
            )  # fmt: skip
    document = {"id": manifest.id, "uri": place.storage.uri(manifest.name), "is_pinned": pinned}
    words = "is pinned: nothing deletes it before `unpin`" if pinned else "is not pinned any more"
    output.result(document, lambda: output.line(f"{manifest.id} {words}"))
    return 0


# -- rebuild -----------------------------------------------------------------------------------------------------------


def rebuild(arguments: argparse.Namespace, output: Output) -> int:
    """Exit code 1 when something could not be read."""
    from orchestrator.checkpoints import index

    stack = Stack.load(arguments.home)
    if not (arguments.run or stack.storage_url):
        raise ConfigError("storage.url", None, "this stack has no place for files.", "Run `orc up`, or give a RUN.")
    with Places(arguments.home) as places, Patience(output, "looking") as patience:
        run = _run_id(places, arguments.run) if arguments.run else ""

        def progress(what: str, done: int, count: int) -> None:
            patience.say(f"run {done + 1:,} of {count:,}: {what}")

        found = index.rebuild(
            places.store, stack.storage_url, user=user_name(), now=time.time(), run=run, progress=progress
        )

    def render() -> None:
        output.line(f"{found.checkpoints:,} checkpoints of {found.runs:,} runs; {found.changed:,} rows were put right")
        for what, each in (
            ("no longer there", found.gone), ("of a run the database does not know", found.unknown),
            ("not there, its rows were left alone", found.missing),
        ):  # fmt: skip
            for one in each:
                output.line(f"  {one}: {what}")
        for uri, why in found.damaged:
            output.line(f"  {uri}: {why}", style="red")

    output.result(found, render)
    return 1 if found.damaged else 0


def _run_id(places: Places, reference: str) -> str:
    from orchestrator.catalog.database import DatabaseCatalog

    return DatabaseCatalog(places.store).run(reference).run
