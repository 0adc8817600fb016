"""What follows a commit: the pointers move, what no rule keeps is deleted, what crashes left is swept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, goodness, pointers
from orchestrator.checkpoints.catalog import Found, Hold
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.manifest import MANIFEST, Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy, also_best
from orchestrator.checkpoints.quota import LOOK_SECONDS, Quota
from orchestrator.checkpoints.retention import doomed, kept
from orchestrator.errors import CheckpointCorrupt, CheckpointError

SWEEP_EVERY = 3600.0
NO_RULE, OWN_QUOTA = "no rule keeps it", "the quota"
"""Why a checkpoint is deleted, in the note that stays."""


def keep_rules(policy: CheckpointPolicy) -> KeepRules:
    """What the settings say about keeping."""
    first = BestRule(metric=policy.best_metric, direction=policy.best_direction, count=policy.keep_best)
    others = (
        BestRule(metric=metric, direction=direction, count=count)
        for metric, direction, count in map(also_best, policy.also_best)
    )
    return KeepRules(
        last=policy.keep_last, best=(first, *others), every_steps=policy.keep_every_steps,
        for_seconds=policy.keep_hours * 3600, quota_bytes=int(policy.quota_gb * 1e9),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidied:
    """What was done after a commit."""

    deleted: tuple[Manifest, ...] = ()
    """Of this run; also what others deleted since the last commit."""
    for_quota: str = ""
    """What was deleted to keep to the quota, and of which run, for people; "" if nothing was."""
    why: str = ""
    """What could not be done; it costs space, no checkpoint."""


class Keeping:
    """Keeps a run's directory of checkpoints as the rules say, and its experiment within its quota. Remembers
    manifests, so that a commit costs one listing and the manifests that are new to it."""

    def __init__(self, storage: Storage, rules: KeepRules, *, attempt: int) -> None:
        self._storage, self._rules, self._attempt = storage, rules, attempt
        self._known: dict[str, Manifest] = {}
        self._marks: tuple[goodness.Mark, ...] = ()
        self._quota: Quota | None = None
        self._swept_at: float | None = None

    def vouch(self, step: int) -> None:
        """From now on the training is known to have gone well up to `step`; see KeepRules."""
        if step != self._rules.vouched:
            self._rules = replace(self._rules, vouched=step)

    def after_commit(self, newest: Manifest, *, now: float) -> Tidied:
        """Never raises for what the storage does; `now` is in seconds since 1970."""
        deleted: list[Manifest] = []
        for_quota: list[tuple[str, Manifest]] = []
        why = ""
        try:
            deleted += self._look(newest)
            for manifest, reason in self._doomed(newest.name, now):
                catalog.remove(self._storage, manifest.name, manifest=manifest, why=reason, now=now)
                del self._known[manifest.name]
                deleted.append(manifest)
                if reason == OWN_QUOTA:
                    for_quota.append((newest.run, manifest))
            if self._rules.quota_bytes:
                self._keep_to_quota(newest, deleted, for_quota, now)
            good = [each.manifest for each in self._found() if not each.is_bad]
            pointers.update(self._storage, good, self._rules, now=now)
            if self._swept_at is None or now - self._swept_at >= SWEEP_EVERY:
                self._swept_at = now
                catalog.sweep(self._storage, attempt=self._attempt, now=now)
                catalog.sweep_partial(self._storage, now=now)
        except (OSError, CheckpointError) as error:
            why = f"{error}" or type(error).__name__
        return Tidied(deleted=tuple(deleted), for_quota=self._told(newest.run, for_quota), why=why)

    def _look(self, newest: Manifest) -> list[Manifest]:
        """Others delete and commit here too: a user, a neighbour for the quota, the writer of an attempt that is over.
        What was deleted since the last look."""
        entries = self._storage.entries()
        has_marks = any(entry.name == goodness.DIRECTORY for entry in entries)
        self._marks = goodness.marks(self._storage) if has_marks else ()
        names = {entry.name for entry in entries if entry.is_dir and catalog.is_name(entry.name)}
        known = {name: manifest for name, manifest in self._known.items() if name in names}
        gone = [self._known[name] for name in sorted(self._known.keys() - names, key=catalog.age_key)]
        for name in sorted(names - known.keys() - {newest.name}):
            try:
                known[name] = catalog.read_manifest(self._storage.join(name))
            except (FileNotFoundError, CheckpointCorrupt):
                continue  # not a checkpoint: the reader's to say, when one is wanted
        self._known = {**known, newest.name: newest}
        return gone

    def _found(self) -> list[Found]:
        return [
            Found(manifest=manifest, is_bad=bool(goodness.why_bad(manifest, self._marks)))
            for manifest in self._known.values()
        ]

    def _doomed(self, newest: str, now: float) -> list[tuple[Manifest, str]]:
        """Each with the reason."""
        found = {each.manifest.name: each for each in self._found()}
        while True:
            everything = list(found.values())
            chosen = doomed(everything, self._rules, now=now, attempt=self._attempt, newest=newest)
            # Asked only of those that would go: a listing each.
            refused = {manifest.name: self._kept_after_all(manifest.name, now) for manifest in chosen}
            if not any(holds is None or holds for holds in refused.values()):
                because = kept(everything, self._rules, now=now)
                return [(manifest, OWN_QUOTA if manifest.name in because else NO_RULE) for manifest in chosen]
            for name, holds in refused.items():
                if holds is None:
                    del found[name], self._known[name]
                elif holds:
                    found[name] = replace(found[name], holds=holds)

    def _kept_after_all(self, name: str, now: float) -> frozenset[Hold] | None:
        """What holds a checkpoint; None if it is none any more: found damaged, its bytes are not ours to delete."""
        return catalog.holds(self._storage, name, now=now) if self._storage.exists(f"{name}/{MANIFEST}") else None

    # -- the quota ---------------------------------------------------------------------------------------------------

    def _keep_to_quota(
        self, newest: Manifest, deleted: list[Manifest], for_quota: list[tuple[str, Manifest]], now: float
    ) -> None:
        """Adds to `deleted` and `for_quota` as it goes, for it may fail halfway."""
        if self._quota is None:
            self._quota = Quota(self._storage, self._rules, run=newest.run)
        if not self._quota.experiment:
            return  # alone: `doomed` has done it
        quota, until = self._quota, time.monotonic() + LOOK_SECONDS
        fixed = {newest.name} | {name for name, each in self._known.items() if each.attempt > self._attempt}
        mine = {each.manifest.name: each for each in self._found()}
        chosen = quota.over(list(mine.values()), frozenset(fixed), now=now)
        while chosen:
            was_refused = False
            for run, manifest in chosen:
                if time.monotonic() >= until:
                    return  # the next commit goes on
                if run != newest.run:
                    why = f"the quota of experiment {quota.experiment}, when run {newest.run} saved"
                    if quota.remove(run, manifest, why=why, now=now):
                        for_quota.append((run, manifest))
                    else:
                        was_refused = True
                    continue
                holds = self._kept_after_all(manifest.name, now)
                if holds:
                    mine[manifest.name] = replace(mine[manifest.name], holds=holds)
                    was_refused = True
                    continue
                del self._known[manifest.name], mine[manifest.name]
                if holds is not None:
                    why = f"the quota of experiment {quota.experiment}"
                    catalog.remove(self._storage, manifest.name, manifest=manifest, why=why, now=now)
                    deleted.append(manifest)
                    for_quota.append((run, manifest))
            if not was_refused:
                return
            chosen = quota.still_over(list(mine.values()), frozenset(fixed), now=now)

    def _told(self, run: str, gone: Sequence[tuple[str, Manifest]]) -> str:
        if not gone:
            return ""
        names = [manifest.name if of == run else manifest.id for of, manifest in gone]
        names = [*names[:8], "…"] if len(names) > 8 else names
        size = sum(manifest.size_bytes for _, manifest in gone)
        experiment = self._quota.experiment if self._quota else ""
        whose = f"experiment {experiment}" if experiment else "this run"
        count = f"{len(gone)} checkpoint{'' if len(gone) == 1 else 's'}"
        return (
            f"{count} ({size / 1e9:.3g} GB) deleted because {whose} may have {self._rules.quota_bytes / 1e9:.3g} GB "
            f"(checkpoints.quota_gb), oldest first: {', '.join(names)}"
        )
