"""`orc checkpoint rm` and `gc`: delete checkpoints, after saying which. The manifest goes first, the index follows."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from orchestrator.account import user_name
from orchestrator.checkpoints import catalog, commit, pointers, retention
from orchestrator.checkpoints.catalog import Found, Hold, Incomplete, Scan
from orchestrator.checkpoints.index import row_of
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.manifest import CheckpointState, Manifest
from orchestrator.cli import text
from orchestrator.cli.checkpoint_places import Place, Places, Unreachable
from orchestrator.cli.keep_rules import from_config
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError
from orchestrator.cli.patience import Patience
from orchestrator.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from orchestrator.store.views import CheckpointRow, RunDetail

NO_LIMIT = 1_000_000
GRACE = 3600.0
"""Seconds for which what is unfinished is left to whoever may still finish it."""


class Held(UserError):
    """A checkpoint that something needs."""

    def __init__(self, checkpoint: str, why: str, hint: str) -> None:
        super().__init__(checkpoint, why, hint)
        self.checkpoint, self.why, self.hint = checkpoint, why, hint

    def __str__(self) -> str:
        return f"{self.checkpoint} is not removed: {self.why}. {self.hint}"


# -- rm ----------------------------------------------------------------------------------------------------------------


def rm(arguments: argparse.Namespace, output: Output) -> int:
    with Places(arguments.home) as places:
        doomed = _named(places, arguments.checkpoints)
        for place, found in doomed:
            _refuse(places, place, found, force=arguments.force)
        lines = [_line(place, found.manifest) for place, found in doomed]
        document = {
            "dry_run": arguments.dry_run,
            "checkpoints": [_document(place, found.manifest, "") for place, found in doomed],
        }
        if arguments.dry_run:
            output.result(document, lambda: _tell(output, lines, "would be removed"))
            return 0
        if not (arguments.yes or _agreed(lines, output)):
            output.message("orc: nothing was removed")
            return 1
        with Patience(output, "removing") as patience:
            for number, (place, found) in enumerate(doomed, start=1):
                patience.say(f"removing {number:,} of {len(doomed):,}: {found.manifest.name}")
                _remove(places, place, found.manifest, f"`orc checkpoint rm` by {user_name()}")
        for place in {place.reference: place for place, _ in doomed}.values():
            rules = from_config(place.run.config) if place.run else None
            if rules is not None:
                pointers.update(place.storage, place.scan().good, rules, now=time.time())
    output.result(document, lambda: _tell(output, lines, "removed"))
    return 0


def _named(places: Places, references: Sequence[str]) -> list[tuple[Place, Found]]:
    """Each once. Raises before anything is removed if one of them is not there."""
    chosen: dict[str, tuple[Place, Found]] = {}
    for reference in references:
        place, name = places.find(reference)
        if not name:
            raise UsageError(f"say which: RUN@NAME. `orc checkpoint ls {place.reference}` lists them.")
        found = place.chosen(place.scan(), name)
        chosen.setdefault(place.storage.uri(found.manifest.name), (place, found))
    return list(chosen.values())


def _refuse(places: Places, place: Place, found: Found, *, force: bool) -> None:
    manifest = found.manifest
    model = places.store.registered_checkpoints(place.run.run).get(manifest.id) if place.run else None
    if model or Hold.registered in found.holds:
        raise Held(manifest.id, f"{f'model {model}' if model else 'a registered model'} was made from it", "")
    if force:
        return
    if Hold.pinned in found.holds:
        unpin = f"orc checkpoint unpin {place.reference}@{manifest.name}"
        raise Held(manifest.id, "it is pinned", f"`{unpin}` first, or --force.")
    if Hold.in_use in found.holds:
        raise Held(manifest.id, "somebody is reading it", "Wait until that ends, or --force.")
    good = place.scan().good
    resumable = [each for each in good if each.resumable]  # what is newest may be weights alone
    needed = {each.name for each in (*good[:1], *resumable[:1])}
    if place.run is not None and not place.run.status.is_terminal and manifest.name in needed:
        why = f"it is the newest of run {place.run.name}, which is {place.run.status} and would restart from it"
        raise Held(manifest.id, why, f"`orc cancel {place.run.run}` ends the run; --force removes it all the same.")


def _remove(places: Places, place: Place, manifest: Manifest, why: str) -> None:
    try:
        catalog.remove(place.storage, manifest.name, manifest=manifest, why=why, now=time.time())
    except OSError as error:
        raise Unreachable(place.storage.uri(manifest.name), error.strerror or str(error)) from error
    if place.run is not None:
        places.store.mark_checkpoints(
            place.run.run, [manifest.id], CheckpointState.deleted, user=user_name(), now=time.time()
        )


# -- gc ----------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Cleaning:
    """What shall go of one run."""

    place: Place
    found: list[Found]
    """All of its checkpoints, with what holds them."""
    rules: KeepRules | None = None
    delete: dict[str, str] = field(default_factory=dict)
    """Name -> why."""
    finish: list[Incomplete] = field(default_factory=list)
    """Whole but for the manifest, which whoever wrote them did not live to write."""
    sweep: list[Incomplete] = field(default_factory=list)
    """Left half written."""
    gone: list[str] = field(default_factory=list)
    """Ids that the database lists and that are not there: others deleted them, for the experiment's quota perhaps."""
    left: str = ""
    """Why nothing is done here, if so."""

    def manifests(self) -> list[Manifest]:
        return [found.manifest for found in reversed(self.found) if found.manifest.name in self.delete]


def gc(arguments: argparse.Namespace, output: Output) -> int:
    """Only says what would go, unless --yes is given."""
    if arguments.run and arguments.experiment:
        raise UsageError("give a RUN or --experiment, not both.")
    is_dry = arguments.dry_run or not arguments.yes
    now = time.time()
    with Places(arguments.home) as places, Patience(output, "looking") as patience:
        work = []
        runs = _runs(places, arguments)
        for number, run in enumerate(runs, start=1):
            patience.say(f"run {number:,} of {len(runs):,}: {run.name}")
            try:
                work.append(_cleaning(places, run, arguments, now))
            except UserError as error:
                if arguments.run:
                    raise
                work.append(Cleaning(place=places.of(run), found=[], left=str(error)))
        if arguments.quota_gb:
            _share_quota(work, int(arguments.quota_gb * 1e9), "the quota")
        elif not arguments.run:
            for experiment, quota_bytes, of_it in _experiments(work):
                _share_quota(of_it, quota_bytes, f"the quota of experiment {experiment}")
        if not is_dry:
            for number, each in enumerate(work, start=1):
                patience.say(f"cleaning run {number:,} of {len(work):,}: {each.place.title}")
                _clean(places, each, now)
    size = sum(manifest.size_bytes for each in work for manifest in each.manifests())
    document = {"dry_run": is_dry, "size_bytes": size, "runs": [_run_document(each) for each in work]}
    output.result(document, lambda: _tell_cleaning(output, work, size, is_dry=is_dry))
    return 0


def _runs(places: Places, arguments: argparse.Namespace) -> list[RunDetail]:
    from orchestrator.catalog.database import DatabaseCatalog

    asked = DatabaseCatalog(places.store)
    if arguments.run:
        return [asked.run(arguments.run)]
    rows = asked.runs(experiment=arguments.experiment, limit=NO_LIMIT)
    return [run for run in (places.store.run(row.run) for row in rows) if run.directory]


def _cleaning(places: Places, run: RunDetail, arguments: argparse.Namespace, now: float) -> Cleaning:
    place = places.of(run)
    listed = places.store.checkpoints(run.run)  # before looking, so that what is committed meanwhile is not called gone
    scan = place.scan()
    gone = _gone(place, scan, listed)
    registered = places.store.registered_checkpoints(run.run)
    found = [
        replace(each, holds=each.holds | {Hold.registered}) if each.manifest.id in registered else each
        for each in scan.found
    ]
    if not run.status.is_terminal:
        # What it has counts for a quota, and is its own writer's to delete.
        found = [replace(each, holds=each.holds | {Hold.in_use}) for each in found]
        return Cleaning(
            place=place, found=found, gone=gone, left=f"it is {run.status} and keeps its directory in order itself"
        )
    work = Cleaning(place=place, found=found, gone=gone, rules=_rules(run, arguments))
    for each in scan.unfinished:
        if each.modified and now - each.modified >= GRACE:
            (work.finish if _is_whole(place, each) else work.sweep).append(each)
    if work.rules is None:
        if found:
            work.left = "its config does not say what to keep: give --keep-last"
    elif found:
        doomed = retention.doomed(
            found, work.rules, now=now, attempt=run.attempt, newest=found[0].manifest.name
        )  # fmt: skip
        kept = retention.kept(found, work.rules, now=now)
        work.delete = {
            manifest.name: "the quota" if manifest.name in kept else "no rule keeps it" for manifest in doomed
        }
    return work


def _gone(place: Place, scan: Scan, listed: Sequence[CheckpointRow]) -> list[str]:
    names = {manifest.name for manifest in scan.committed}
    if not place.storage.exists():  # on another host, not mounted, or never made
        return []
    there = (CheckpointState.committed, CheckpointState.bad)
    ours = [row for row in listed if row.state in there and catalog.is_name(_name(row))]
    return [row.id for row in ours if _name(row) not in names and not place.storage.exists(_name(row))]


def _name(row: CheckpointRow) -> str:
    return row.id.rpartition("/")[2]


def _rules(run: RunDetail, arguments: argparse.Namespace) -> KeepRules | None:
    """What the run's config says, but for what is given here."""
    given = {
        "last": arguments.keep_last,
        "every_steps": arguments.keep_every_steps,
        "for_seconds": None if arguments.keep_hours is None else arguments.keep_hours * 3600,
    }
    told = {name: value for name, value in given.items() if value is not None}
    rules = from_config(run.config)
    if rules is None:
        if arguments.keep_last is None:
            return None
        rules = KeepRules(best=(BestRule(),))
    rules = replace(rules, **told)
    if arguments.keep_best is not None:
        rules = replace(rules, best=tuple(replace(rule, count=arguments.keep_best) for rule in rules.best))
    return rules


def _is_whole(place: Place, unfinished: Incomplete) -> bool:
    """Whether every rank was done, so that only the manifest is missing."""
    try:
        done = commit.receipts(place.storage.join(unfinished.name))
    except (CheckpointError, OSError):
        return False
    return 0 in done and len(done) == done[0].world_size


def _experiments(work: Sequence[Cleaning]) -> Iterator[tuple[str, int, list[Cleaning]]]:
    """Each with the quota that its newest run says, as the writers of its runs apply it."""
    of: dict[str, list[Cleaning]] = {}
    for each in work:
        if each.place.run is not None:
            of.setdefault(each.place.run.experiment, []).append(each)
    for experiment, runs in of.items():
        newest = max((each.place.run for each in runs if each.place.run), key=lambda run: (run.created, run.run))
        rules = from_config(newest.config)
        if rules is not None and rules.quota_bytes:
            yield experiment, rules.quota_bytes, runs


def _share_quota(work: Sequence[Cleaning], quota_bytes: int, why: str) -> None:
    """What all these runs have together shall not be more."""
    places = {each.place.reference: each for each in work}
    left = {
        reference: [found for found in each.found if found.manifest.name not in each.delete]
        for reference, each in places.items()
    }
    rules = next((each.rules for each in work if each.rules is not None), None)
    for reference, manifest in retention.over_quota(left, quota_bytes, rules=rules):
        places[reference].delete[manifest.name] = why


def _clean(places: Places, work: Cleaning, now: float) -> None:
    place = work.place
    assert place.run is not None
    try:
        for each in list(work.finish):
            try:
                manifest = commit.finish(place.storage.join(each.name))
            except CheckpointError:
                manifest = None
            if manifest is None:
                work.finish.remove(each)
                work.sweep.append(each)
                continue
            row = row_of(Found(manifest=manifest), place.storage.uri(manifest.name))
            places.store.put_checkpoints(place.run.run, [row], user=user_name(), now=now)
        for manifest in work.manifests():
            _remove(places, place, manifest, f"{work.delete[manifest.name]} (`orc checkpoint gc`)")
        if work.gone:
            state = CheckpointState.deleted
            places.store.mark_checkpoints(place.run.run, work.gone, state, user=user_name(), now=now)
        swept = catalog.sweep(place.storage, attempt=place.run.attempt + 1, now=now, grace=GRACE) if work.sweep else []
        if place.run.status.is_terminal:
            catalog.sweep_partial(place.storage, now=now, grace=GRACE)
    except OSError as error:
        raise Unreachable(place.storage.uri(), error.strerror or str(error)) from error
    work.sweep = [each for each in work.sweep if each.name in swept]
    if work.rules is not None:
        pointers.update(place.storage, place.scan().good, work.rules, now=now)


def _run_document(work: Cleaning) -> dict[str, Any]:
    return {
        "run": work.place.reference,
        "name": work.place.run.name if work.place.run else "",
        "delete": [
            _document(work.place, manifest, work.delete[manifest.name]) for manifest in work.manifests()
        ],
        "finish": [each.name for each in work.finish],
        "sweep": [each.name for each in work.sweep],
        "gone": work.gone,
        "left": work.left,
    }  # fmt: skip


def _tell_cleaning(output: Output, work: Sequence[Cleaning], size_bytes: int, *, is_dry: bool) -> None:
    would = "would be " if is_dry else ""
    count = 0
    for each in work:
        for manifest in each.manifests():
            count += 1
            output.line(f"{would}removed: {_line(each.place, manifest)}: {each.delete[manifest.name]}")
        for unfinished in each.finish:
            output.line(f"{would}finished: {each.place.reference}/{unfinished.name}: every rank had written its part")
        for unfinished in each.sweep:
            output.line(f"{would}removed: {each.place.reference}/{unfinished.name}: left half written by a crash")
        for gone in each.gone:
            output.line(f"{would}marked as deleted: {gone}: it is not there any more")
        if each.left:
            output.line(f"left alone: {each.place.title}: {each.left}")
    checkpoints = f"{count:,} checkpoint{'' if count == 1 else 's'}"
    output.line(f"{checkpoints} of {len(work):,} runs, {text.size(size_bytes)}{'; --yes does it' if is_dry else ''}")


# -- saying it ---------------------------------------------------------------------------------------------------------


def _document(place: Place, manifest: Manifest, why: str) -> dict[str, Any]:
    return {
        "id": manifest.id, "name": manifest.name, "uri": place.storage.uri(manifest.name), "step": manifest.step,
        "size_bytes": manifest.size_bytes, "why": why,
    }  # fmt: skip


def _line(place: Place, manifest: Manifest) -> str:
    best = ", best" if manifest.is_best else ""
    return f"{place.title}: {manifest.name} (step {manifest.step}{best}, {text.size(manifest.size_bytes)})"


def _tell(output: Output, lines: Sequence[str], what: str) -> None:
    for line in lines:
        output.line(f"{what}: {line}")


def _agreed(lines: Sequence[str], output: Output) -> bool:
    if output.as_json or not (sys.stdin.isatty() and output.stderr.isatty()):
        raise UsageError("there is no terminal to ask on: say --yes to remove, --dry-run to see what would go.")
    for line in lines:
        output.message(line)
    which = "this checkpoint" if len(lines) == 1 else f"these {len(lines)} checkpoints"
    output.stderr.write(f"Remove {which} for good? [y/N] ")
    output.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
