"""Which checkpoints are deleted: what any policy keeps, stays.

Every policy is a function that takes the checkpoints, newest first, and gives the names it keeps with its reason.
None looks at a clock or a disk. Adding a newer checkpoint never makes a policy keep one that it did not keep before,
so what is deleted is never missed later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestrator.checkpoints.catalog import age_key
from orchestrator.checkpoints.manifest import Manifest
from orchestrator.checkpoints.policy import Direction

if TYPE_CHECKING:
    from orchestrator.checkpoints.catalog import Found
    from orchestrator.checkpoints.job import BestRule, KeepRules

Policy = Callable[[Sequence[Manifest], "KeepRules", float], Iterable[tuple[str, str]]]


def kept(checkpoints: Sequence[Found], rules: KeepRules, *, now: float) -> dict[str, tuple[str, ...]]:
    """Name -> why it is kept, oldest first; those that nothing keeps are left out.

    Example: {"step_00000010-a1": ("best val/loss",), "step_00000030-a1": ("last", "pinned")}. `now` is in seconds since
    1970. What holds a checkpoint (pinned, registered, in use) keeps it whatever the rules say. Those that are no good
    are kept by no rule, unless all are.
    """
    by_age = sorted(checkpoints, key=lambda found: age_key(found.manifest.name))
    reasons: dict[str, list[str]] = {found.manifest.name: [] for found in by_age}
    for found in by_age:
        reasons[found.manifest.name] += ["all are kept"] if found.is_bad and not rules.last else []
    newest_first = [found.manifest for found in reversed(by_age) if not found.is_bad]
    for policy in _POLICIES:
        for name, reason in policy(newest_first, rules, now):
            reasons[name].append(reason)
    for found in checkpoints:
        reasons[found.manifest.name] += sorted(hold.name.replace("_", " ") for hold in found.holds)
    return {name: tuple(why) for name, why in reasons.items() if why}


def doomed(checkpoints: Sequence[Found], rules: KeepRules, *, now: float, attempt: int, newest: str) -> list[Manifest]:
    """Those to delete, oldest first: what nothing keeps, and what must go besides for the run to fit its quota.

    Never `newest`, the name of the one just committed, and never one of a later attempt than `attempt`: whoever is left
    over from an earlier attempt does not know what the later one needs. `rules.last == 0` keeps all that the quota has
    room for, and the newest one that training can continue from stays even beyond the quota.
    """
    because = kept(checkpoints, rules, now=now)
    by_age = _by_age(checkpoints)
    mine = [found for found in by_age if found.manifest.name != newest and found.manifest.attempt <= attempt]
    gone = [found.manifest for found in mine if found.manifest.name not in because]
    if rules.quota_bytes:
        names = {manifest.name for manifest in gone}
        stay = [found.manifest for found in by_age if found.manifest.name not in names]
        fixed = names | _needed(checkpoints) | {name for name, why in because.items() if VOUCHED in why}
        movable = [found.manifest for found in mine if found.manifest.name not in fixed and not found.holds]
        # The best ones go last: they cannot be made again by training on.
        movable.sort(key=lambda manifest: any(why.startswith("best") for why in because[manifest.name]))
        gone += _excess(stay, movable, rules.quota_bytes)
    return sorted(gone, key=lambda manifest: age_key(manifest.name))


def over_quota(
    runs: Mapping[str, Sequence[Found]],
    quota_bytes: int,
    *,
    rules: KeepRules | None = None,
    may_go: Callable[[str, Manifest], bool] | None = None,
) -> list[tuple[str, Manifest]]:
    """What runs that share a quota must give up, as (run, checkpoint), oldest first by the time it was made; with
    `rules` the best ones of each run go last.

    Each run keeps its newest checkpoint and its newest one that training can continue from; what is held stays too, and
    what `may_go` says no to. So the rest may still be larger than the quota. 0 is no quota.
    """
    if not quota_bytes:
        return []
    present = [found.manifest for each in runs.values() for found in each]
    if sum(manifest.size_bytes for manifest in present) <= quota_bytes:
        return []
    run_of = {id(found.manifest): run for run, each in runs.items() for found in each}
    movable: list[Manifest] = []
    best: set[int] = set()
    for run, each in runs.items():
        needed = _needed(each)
        movable += [
            found.manifest
            for found in each
            if not found.holds and found.manifest.name not in needed and (may_go is None or may_go(run, found.manifest))
        ]
        newest_first = [found.manifest for found in reversed(_by_age(each)) if not found.is_bad]
        for rule in rules.best if rules else ():
            best |= {id(manifest) for manifest in ranked(newest_first, rule)[: rule.count]}
    movable.sort(key=lambda m: (id(m) in best, m.created, run_of[id(m)], age_key(m.name)))
    return [(run_of[id(manifest)], manifest) for manifest in _excess(present, movable, quota_bytes)]


def _excess(present: Sequence[Manifest], movable: Sequence[Manifest], quota_bytes: int) -> list[Manifest]:
    """The first ones of `movable` without which the rest fits, or all of them."""
    over = sum(manifest.size_bytes for manifest in present) - quota_bytes
    gone = []
    for manifest in movable:
        if over <= 0:
            break
        gone.append(manifest)
        over -= manifest.size_bytes
    return gone


def _needed(checkpoints: Sequence[Found]) -> set[str]:
    by_age = [found.manifest for found in _by_age(checkpoints) if not found.is_bad]
    return {manifest.name for manifest in (*by_age[-1:], *[m for m in by_age if m.resumable][-1:])}


def _by_age(checkpoints: Sequence[Found]) -> list[Found]:
    return sorted(checkpoints, key=lambda found: age_key(found.manifest.name))


# -- policies ------------------------------------------------------------------------------------------------


def _last(newest_first: Sequence[Manifest], rules: KeepRules, now: float) -> Iterable[tuple[str, str]]:
    """The last K, and the last K of those that hold weights only: these replace nothing that training continues
    from."""
    if not rules.last:
        return [(manifest.name, "all are kept") for manifest in newest_first]
    resumable = [manifest for manifest in newest_first if manifest.resumable]
    weights = [manifest for manifest in newest_first if not manifest.resumable]
    return [(manifest.name, "last") for manifest in (*resumable[: rules.last], *weights[: rules.last])]


def _best(newest_first: Sequence[Manifest], rules: KeepRules, now: float) -> Iterable[tuple[str, str]]:
    for rule in rules.best:
        for manifest in ranked(newest_first, rule)[: rule.count]:
            yield manifest.name, f"best {rule.metric}".strip()


def _every_steps(newest_first: Sequence[Manifest], rules: KeepRules, now: float) -> Iterable[tuple[str, str]]:
    """The first one at or after each multiple of N: saves seldom fall on the multiple itself."""
    if not rules.every_steps:
        return
    seen = {0}
    for manifest in reversed(newest_first):
        turn = manifest.step // rules.every_steps
        if turn not in seen:
            seen.add(turn)
            yield manifest.name, f"every {rules.every_steps} steps"


def _young(newest_first: Sequence[Manifest], rules: KeepRules, now: float) -> Iterable[tuple[str, str]]:
    for manifest in newest_first:
        if rules.for_seconds and now - manifest.created < rules.for_seconds:
            yield manifest.name, f"younger than {rules.for_seconds / 3600:g} h"


def _vouched(newest_first: Sequence[Manifest], rules: KeepRules, now: float) -> Iterable[tuple[str, str]]:
    """The newest one that is known to be good, to go back to should the training turn out to have gone wrong since; and
    the oldest after it, which will be that when more is known."""
    if rules.vouched < 0:
        return
    usable = [manifest for manifest in newest_first if manifest.resumable]
    known = [manifest for manifest in usable if manifest.step <= rules.vouched]
    later = [manifest for manifest in usable if manifest.step > rules.vouched]
    for manifest in (*known[:1], *later[-1:]):
        yield manifest.name, VOUCHED


VOUCHED = "known to be good"
_POLICIES: tuple[Policy, ...] = (_last, _best, _every_steps, _young, _vouched)


def ranked(newest_first: Sequence[Manifest], rule: BestRule) -> list[Manifest]:
    """Those that the rule's metric measured, best first, of equal ones the newer; NaN is no measurement. A rule without
    a metric means those that the user called best, newest first."""
    if not rule.metric:
        return [manifest for manifest in newest_first if manifest.is_best]
    sign = -1.0 if rule.direction == Direction.max else 1.0
    measured = [m for m in newest_first if not math.isnan(m.metrics.get(rule.metric, math.nan))]
    return sorted(measured, key=lambda m: sign * m.metrics[rule.metric])
