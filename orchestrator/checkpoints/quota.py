"""Room that the runs of an experiment share: what of which run goes when their checkpoints take more."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, goodness
from orchestrator.checkpoints.catalog import DIRECTORY, Found, Hold, age_key
from orchestrator.checkpoints.job import KeepRules
from orchestrator.checkpoints.manifest import MANIFEST, FileEntry, Manifest, UnknownFormat
from orchestrator.checkpoints.retention import over_quota
from orchestrator.errors import CheckpointCorrupt

ACTIVE = 3600.0
"""Seconds for which what another run committed is left alone: it saves, and keeps to the quota itself."""
LOOK_EVERY = 16
"""Commits between two looks at the other runs while there is room, or while nothing may be deleted."""
LOOK_SECONDS = 5.0
"""A look at the other runs takes no longer; the next commit goes on where it ended."""


class Quota:
    """What other runs of the experiment have, as far as is known, and what of theirs has to go.

    Runs lie in `<experiment>/<run>/checkpoints`; a `storage` that is no such directory has no neighbours. Sizes are
    those that manifests tell; what is unfinished or set aside does not count. Several runs may look at once: what is
    gone already is no error, and each deletes in the same order.
    """

    def __init__(self, storage: Storage, rules: KeepRules, *, run: str) -> None:
        self._rules, self._run = rules, run
        is_run = storage.parts[-2:] == (run, DIRECTORY)
        self._experiment = storage.above(2) if is_run else None
        self._others: dict[str, dict[str, Found]] = {}
        self._queue: list[str] = []
        """Runs that this look has not come to, from the oldest on: what they have would go first."""
        self._since_look = LOOK_EVERY

    @property
    def experiment(self) -> str:
        return self._experiment.parts[-1] if self._experiment else ""

    def over(self, mine: Sequence[Found], fixed: frozenset[str], *, now: float) -> list[tuple[str, Manifest]]:
        """What has to go, as (run, checkpoint), after a commit; of this run nothing that is `fixed`. `mine` is all that
        this run has. Raises OSError."""
        self._since_look += 1
        chosen = self.still_over(mine, fixed, now=now)
        # Nothing is deleted by what was seen long ago: others may have made room. Where nothing could go, looking again
        # at once would not help.
        if self._experiment is not None and (self._queue or chosen or self._since_look >= LOOK_EVERY):
            self._look()
            chosen = self.still_over(mine, fixed, now=now)
        return chosen

    def still_over(self, mine: Sequence[Found], fixed: frozenset[str], *, now: float) -> list[tuple[str, Manifest]]:
        """The same by what is known, without a look."""

        def may_go(run: str, manifest: Manifest) -> bool:
            if run == self._run:
                return manifest.name not in fixed
            return now - (manifest.created + manifest.duration) >= ACTIVE

        runs: Mapping[str, Sequence[Found]] = {
            self._run: mine, **{run: list(found.values()) for run, found in self._others.items()}
        }  # fmt: skip
        return over_quota(runs, self._rules.quota_bytes, rules=self._rules, may_go=may_go)

    def remove(self, run: str, manifest: Manifest, *, why: str, now: float) -> bool:
        """Deletes a checkpoint of another run; False if something keeps it after all, or it is gone. The other run's
        list in the database follows when that run saves, goes on or is looked at (`orc checkpoint gc`, `rebuild`): the
        note that stays in its directory says what was deleted and why. Raises OSError."""
        assert self._experiment is not None
        root, known = self._experiment.join(run, DIRECTORY), self._others[run]
        holds = catalog.holds(root, manifest.name, now=now)
        if holds:
            known[manifest.name] = replace(known[manifest.name], holds=holds)
            return False
        newer = [name for name in known if age_key(name) > age_key(manifest.name) and not known[name].is_bad]
        if not any(known[name].manifest.resumable and root.exists(f"{name}/{MANIFEST}") for name in newer):
            # Somebody deleted what was newer: this may be all that the run has.
            known[manifest.name] = replace(known[manifest.name], holds=frozenset({Hold.in_use}))
            return False
        del known[manifest.name]
        try:
            whole = catalog.read_manifest(root.join(manifest.name))
        except (FileNotFoundError, CheckpointCorrupt):
            return False
        catalog.remove(root, manifest.name, manifest=whole, why=why, now=now)
        return True

    def _look(self) -> None:
        assert self._experiment is not None
        self._since_look = 0
        if not self._queue:
            self._queue = [entry.name for entry in self._experiment.entries() if entry.is_dir]
            self._queue = [run for run in self._queue if run != self._run and not run.startswith(".")]
            self._others = {run: found for run, found in self._others.items() if run in set(self._queue)}
        until = time.monotonic() + LOOK_SECONDS
        while self._queue and time.monotonic() < until:
            run = self._queue.pop(0)
            self._others[run] = self._seen(run, self._others.get(run, {}))

    def _seen(self, run: str, known: Mapping[str, Found]) -> dict[str, Found]:
        assert self._experiment is not None
        root = self._experiment.join(run, DIRECTORY)
        found = {}
        entries = root.entries()
        marks = goodness.marks(root) if any(entry.name == goodness.DIRECTORY for entry in entries) else ()
        for entry in entries:
            if not entry.is_dir or not catalog.is_name(entry.name):
                continue
            try:
                before = known.get(entry.name)
                manifest = before.manifest if before else _light(catalog.read_manifest(root.join(entry.name)))
            except (FileNotFoundError, CheckpointCorrupt, UnknownFormat):
                continue
            if manifest.run == run and manifest.name == entry.name:
                is_bad = bool(goodness.why_bad(manifest, marks))
                found[entry.name] = Found(manifest=manifest, is_bad=is_bad)  # what held it may be over
        return found


def _light(manifest: Manifest) -> Manifest:
    """Without the list of its tensors, of which there may be thousands."""
    whole = FileEntry(path="", size_bytes=manifest.size_bytes, head_bytes=0, head_xxh3="")
    return replace(manifest, files=(whole,), data={})
