"""What follows a commit: the pointers move, what no rule keeps is deleted, what crashes left is swept."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, pointers
from orchestrator.checkpoints.catalog import Found
from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.policy import CheckpointPolicy, also_best
from orchestrator.checkpoints.retention import doomed
from orchestrator.errors import CheckpointCorrupt, CheckpointError

SWEEP_EVERY = 3600.0


def keep_rules(policy: CheckpointPolicy) -> KeepRules:
    """What the settings say about keeping."""
    first = BestRule(metric=policy.best_metric, direction=policy.best_direction, count=policy.keep_best)
    others = (
        BestRule(metric=metric, direction=direction, count=count)
        for metric, direction, count in map(also_best, policy.also_best)
    )
    return KeepRules(
        last=policy.keep_last, best=(first, *others), every_steps=policy.keep_every_steps,
        for_seconds=policy.keep_hours * 3600,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidied:
    """What was done after a commit."""

    deleted: tuple[Manifest, ...] = ()
    why: str = ""
    """What could not be done; it costs space, no checkpoint."""


class Keeping:
    """Keeps a run's directory of checkpoints as the rules say. Remembers manifests, so that a commit costs one listing
    and the manifests that are new to it."""

    def __init__(self, storage: Storage, rules: KeepRules, *, attempt: int) -> None:
        self._storage, self._rules, self._attempt = storage, rules, attempt
        self._known: dict[str, Manifest] = {}
        self._swept_at: float | None = None

    def after_commit(self, newest: Manifest, *, now: float) -> Tidied:
        """Never raises for what the storage does; `now` is in seconds since 1970."""
        deleted: list[Manifest] = []
        try:
            self._look(newest)
            for manifest in self._doomed(newest.name, now):
                catalog.remove(self._storage, manifest.name)
                del self._known[manifest.name]
                deleted.append(manifest)
            pointers.update(self._storage, list(self._known.values()), self._rules, now=now)
            if self._swept_at is None or now - self._swept_at >= SWEEP_EVERY:
                self._swept_at = now
                catalog.sweep(self._storage, attempt=self._attempt, now=now)
        except (OSError, CheckpointError) as error:
            return Tidied(deleted=tuple(deleted), why=f"{error}" or type(error).__name__)
        return Tidied(deleted=tuple(deleted))

    def _look(self, newest: Manifest) -> None:
        """Others delete and commit here too: a user, the writer of an attempt that is over."""
        names = {entry.name for entry in self._storage.entries() if entry.is_dir and catalog.is_name(entry.name)}
        known = {name: manifest for name, manifest in self._known.items() if name in names}
        for name in names - known.keys() - {newest.name}:
            try:
                known[name] = catalog.read_manifest(self._storage.join(name))
            except (FileNotFoundError, CheckpointCorrupt):
                continue  # not a checkpoint: the reader's to say, when one is wanted
        self._known = {**known, newest.name: newest}

    def _doomed(self, newest: str, now: float) -> list[Manifest]:
        found = {name: Found(manifest=manifest) for name, manifest in self._known.items()}
        while True:
            chosen = doomed(list(found.values()), self._rules, now=now, attempt=self._attempt, newest=newest)
            # Asked only of those that would go: a listing each.
            held = {
                manifest.name: holds
                for manifest in chosen
                if (holds := catalog.holds(self._storage, manifest.name, now=now))
            }
            if not held:
                return chosen
            for name, holds in held.items():
                found[name] = Found(manifest=found[name].manifest, holds=holds)
