"""What follows a failed attempt. Pure: the failure, those before it, the rules and what can be done come in, a decision
goes out.

Each kind of failure has a response: of which budget an attempt is taken, and what is changed besides trying again.
What a restart cannot mend is not tried, and what fails again at the same step is not tried for ever.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from orchestrator.config.names import did_you_mean
from orchestrator.errors import ConfigError
from orchestrator.failures.rollback import Rollback
from orchestrator.seeding import derive
from orchestrator.status import RunStatus


class Budget(StrEnum):
    """Of what a further attempt takes one. Those with a limit of their own are keys of the section `failures`."""

    none = ""
    """Another attempt would fail in the same way."""
    restarts = "max_restarts"
    preemptions = "max_preemptions"
    """No fault of the job: not counted as restarts."""
    halvings = "max_halvings"
    rollbacks = "max_rollbacks"


class Action(StrEnum):
    stop = "stop"
    restart = "restart"
    """Another attempt, as the one before."""
    shrink = "shrink"
    """With the workers that there is room for."""
    resize = "resize"
    """With another number of workers, for which there is room; nothing had failed."""
    longer = "longer"
    """With more time for collectives."""
    halve = "halve"
    """With micro-batches of half the size and twice as many of them: the global batch is kept."""
    rollback = "rollback"
    """From the newest good checkpoint, without the batches that were offending, or with a lower learning rate."""


LONGER = 3
"""So many times as long a collective may take after it has timed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What is done about a kind of failure."""

    budget: Budget = Budget.none
    remedy: Action = Action.restart
    """If it can be carried out; else see `needs_remedy`."""
    needs_remedy: bool = False
    """Without it another attempt is of no use."""
    is_about_the_job: bool = True
    """The same at the same step again will come a third time. Else it says nothing about the step, or the attempts
    between differ."""
    most: int = -1
    """Failures of this kind that are answered, within the budget; -1: as the budget allows."""


_RESTART = Response(budget=Budget.restarts)
_MOVE = Response(budget=Budget.preemptions, remedy=Action.shrink, is_about_the_job=False)
_HALVE = Response(budget=Budget.halvings, remedy=Action.halve, needs_remedy=True, is_about_the_job=False)
_STOP = Response()

RESPONSES: Mapping[str, Response] = {
    "preemption": _MOVE,
    "node_lost": _MOVE,
    "worker_killed": _RESTART,
    "device_fault": _RESTART,
    "hang": _RESTART,
    "storage": _RESTART,
    "service": Response(budget=Budget.restarts, is_about_the_job=False),
    "collective_timeout": Response(budget=Budget.restarts, remedy=Action.longer, most=1),
    "host_out_of_memory": _HALVE,
    "device_out_of_memory": _HALVE,
    "out_of_memory": _HALVE,  # in older records
    "diverged": Response(budget=Budget.rollbacks, remedy=Action.rollback, needs_remedy=True, is_about_the_job=False),
    "data_error": _STOP,
    "time_limit": _STOP,
    "limit": _STOP,
    "user_bug": _STOP,
    "our_bug": _STOP,
    "cancelled": _STOP,
    "unknown": _STOP,
}
"""By kind of failure, as `classify.FailureKind` names them."""


OF_A_MACHINE = frozenset({"worker_killed", "device_fault", "host_out_of_memory", "node_lost", "hang"})
"""Kinds for which the node may be the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A failed attempt, as far as it matters for what follows."""

    status: RunStatus
    kind: str = "unknown"
    type: str = ""
    """Class name of the exception."""
    what: str = ""
    """One line."""
    step: int | None = None
    """How far it had come; None when nobody knows."""
    is_restart_useful: bool | None = None
    """What the wording of the failure says of it, whatever its kind; None: nothing."""
    node: str = ""
    """On which node of the cluster, by its id; "" where nobody knows, or where there is only this host."""
    host: str = ""
    """What people call it."""
    wish: str = ""
    """What a pattern of the user's wants done: `stop`, `restart` or ""."""
    avoids_node: bool = False
    """Whether such a pattern blames the node."""

    @classmethod
    def of(cls, status: RunStatus, error: Mapping[str, Any]) -> Failure:
        """From an attempt's stored error, see `classify.Finding.error`."""
        step, useful = error.get("step"), error.get("is_restart_useful")
        return cls(
            status=status,
            kind=str(error.get("kind") or "unknown"),
            type=str(error.get("type") or ""),
            what=str(error.get("what") or error.get("message") or ""),
            step=int(step) if step is not None else None,
            is_restart_useful=useful if isinstance(useful, bool) else None,
            node=str(error.get("node") or ""),
            host=str(error.get("host") or ""),
            wish=str(error.get("wish") or ""),
            avoids_node=bool(error.get("avoids_node")),
        )

    def to_json(self) -> dict[str, Any]:
        """What `of` makes it of again, with its status."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in found.items() if value not in (None, "")}

    @property
    def signature(self) -> tuple[str, str, str]:
        """Equal for the same failure in two processes: numbers and addresses differ."""
        return self.kind, self.type, _VARIES.sub("#", self.what)[:200]


_VARIES = re.compile(r"0x[0-9a-fA-F]+|\d+(\.\d+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The settings of `failures` that decide. Limits are numbers of attempts; -1: without limit."""

    max_restarts: int = 0
    max_preemptions: int = -1
    max_halvings: int = 0
    max_rollbacks: int = 0
    max_repeats: int = 2
    """The same failure at the same step so often, and no further attempt; 0: never for that."""
    max_fruitless: int = 10
    """Failures in a row of attempts that came no further than those before, and no further one; 0: never for that."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Kind -> budget of its own."""
    backoff: float = 1.0
    """Seconds before the first restart; each further one without progress takes twice as long."""
    backoff_max: float = 60.0
    skip: bool = True
    """After a rollback the batches are left out in which the training went wrong, where these are known."""
    lr_factor: float = 0.5
    """By which learning rates are multiplied from the second rollback on, and where nothing can be left out."""
    avoid_after: int = 2
    """So many failures that are about a machine happen on a node, and the run is no longer placed there; 0: never for
    that."""
    restarts_key: str = "failures.max_restarts"
    """The key that `max_restarts` is of, for words."""
    by_hand: str = "`orc resume` goes on from the newest checkpoint"
    """How to go on where there is no budget, for words."""

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Rules:
        """From the section `failures` as a mapping; what it has besides is left out. Raises ConfigError for what looks
        like a mistyped kind; kinds may have names of the user's."""
        for kind, limit in (section.get("limits") or {}).items():
            if kind not in RESPONSES and (hint := did_you_mean(kind, RESPONSES, cutoff=0.75)):
                raise ConfigError(f"failures.limits.{kind}", limit, "there is no such kind of failure.", hint)
        return cls(**{each.name: section[each.name] for each in fields(cls) if each.name in section})


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What can be done besides trying the same again."""

    actions: frozenset[Action] = frozenset()
    workers: int = 0
    """For `shrink`: how many there is room for now."""
    splits: int = 1
    """For `halve`: the micro-batches into which a batch was divided so far."""
    timeout: float = 0.0
    """For `longer`: seconds that a collective had."""
    rollback: Rollback | None = None
    """For `rollback`: what is known of it."""


NOTHING_BESIDES = Abilities()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What follows an attempt that ended."""

    action: Action = Action.stop
    after: float = 0.0
    """Seconds until the next attempt."""
    words: str = ""
    """What was done and why, in words; empty for an attempt that did not fail."""
    budget: str = ""
    """The key of which an attempt was taken, or of which none is left; empty where none counts."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What the next attempt does otherwise."""

    @property
    def is_restart(self) -> bool:
        return self.action is not Action.stop

    def to_json(self) -> dict[str, Any]:
        return {
            "action": self.action.value, "after": round(self.after, 3), "budget": self.budget,
            "changes": dict(self.changes),
        }  # fmt: skip


def decide(
    failure: Failure,
    history: Sequence[Failure],
    rules: Rules,
    *,
    draw: float,
    can: Abilities = NOTHING_BESIDES,
) -> Decision:
    """`history` are the failures of the same run before this one, oldest first. `draw`, from 0 up to 1, is the random
    part of the pause; see `draw_of`."""
    if failure.status not in (RunStatus.failed, RunStatus.crashed):
        return Decision()
    if failure.wish == Action.stop:
        return _stop("failures.patterns says so")
    response = _response(failure, rules)
    if response.budget is Budget.none:
        return _stop(SAME_AGAIN)
    if response.needs_remedy and response.remedy not in can.actions and failure.kind not in rules.limits:
        return _stop(SAME_AGAIN)
    if why := _is_hopeless(failure, history, response, rules):
        return _stop(why)
    key, most = _limit(failure.kind, response, rules)
    used = _used(failure, history, rules)
    if most == 0:
        return _stop(f"{key} is 0; {rules.by_hand}", budget=key)
    if 0 <= most <= used:
        return _stop(f"all {most} restarts for that ({key}) are used up", budget=key)
    if 0 <= response.most <= sum(earlier.kind == failure.kind for earlier in history):
        return _stop(f"{failure.kind.replace('_', ' ')} again, after it was answered {_times(response.most)}")
    action = _action(response, can)
    count = f"restart {used + 1} of {most}" if most > 0 else f"restart {used + 1}, no limit"
    return _restart(action, failure, history, rules, draw=draw, can=can, why=f"{count}: {key}", budget=key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is known when an attempt begins of what will follow its failure."""

    rules: Rules
    history: Sequence[Failure] = ()
    draw: float = 0.0

    def decided(self, failure: Failure, can: Abilities = NOTHING_BESIDES) -> Decision:
        return decide(failure, self.history, self.rules, draw=self.draw, can=can)

    def overruled(
        self, decision: Decision, action: Action, failure: Failure, can: Abilities = NOTHING_BESIDES
    ) -> Decision:
        """The decision with the action that `failures.function` wants instead, whatever the budgets. Raises ValueError
        for one that cannot be carried out; stop and restart always can."""
        if action is decision.action:
            return decision
        if action is Action.stop:
            return _stop("failures.function says so", budget=decision.budget)
        if action is not Action.restart and action not in can.actions:
            able = ", ".join(sorted({Action.stop, Action.restart, *can.actions}))
            raise ValueError(f"{action} cannot be carried out here; what can: {able}")
        why, budget = "failures.function says so", decision.budget
        return _restart(action, failure, self.history, self.rules, draw=self.draw, can=can, why=why, budget=budget)


def recalled(earlier: Iterable[Mapping[str, Any]]) -> tuple[tuple[Failure, ...], dict[str, Any]]:
    """What an earlier driver of the run leaves to the next: the failures that count, and what they have changed.

    `earlier` are the attempts that failed or finished, oldest first: {"status", "error" with its "decision"}. After a
    decision to stop only a person goes on, as after the end of the work: from there on failures count anew. What made
    a further attempt possible stays: smaller micro-batches, longer timeouts. What was about the cluster of that time
    does not.
    """
    failures: list[Failure] = []
    changes: dict[str, Any] = {}
    for each in earlier:
        status, error = RunStatus(each["status"]), each["error"]
        decision = error.get("decision") or {}
        if decision.get("action") == Action.resize:
            continue  # nothing had failed
        failures.append(Failure.of(status, error))
        changes |= decision.get("changes") or {}
        if status is RunStatus.finished or decision.get("action", Action.stop) == Action.stop:
            failures = []
            changes = {name: value for name, value in changes.items() if name not in _OF_THE_CLUSTER}
    return tuple(failures), changes


_OF_THE_CLUSTER = ("workers", "avoid")


SAME_AGAIN = "the same would only happen again"

_DONE = {
    Action.restart: "restarted from the newest checkpoint",
    Action.shrink: "restarted from the newest checkpoint with the workers that there is room for: {workers}",
    Action.longer: "restarted from the newest checkpoint with more time for collectives",
    Action.halve: "restarted from the newest checkpoint with half the micro-batch",
    Action.rollback: "rolled back to the newest good checkpoint",
}


def fruitless(history: Iterable[Failure], failure: Failure) -> int:
    """How many failures in a row, up to this one, came no further than the attempts before them. Where the step is not
    known, nothing tells of progress."""
    furthest, count = -1, 0
    for each in (*history, failure):
        if each.step is not None and each.step > furthest:
            furthest, count = each.step, 0
        else:
            count += 1
    return count


def pause_before(without_progress: int, restarts: int, rules: Rules, draw: float) -> float:
    """Seconds: doubled with each failure without progress, half of it random, so that what fell together does not rise
    together ("equal jitter": M. Brooker, Exponential Backoff And Jitter, AWS Architecture Blog, 2015)."""
    doubled = min(without_progress, restarts, 30)  # the first one may not know its step
    longest = min(rules.backoff * 2.0**doubled, rules.backoff_max)
    return longest / 2 * (1 + draw)


def draw_of(run: str, attempt: int) -> float:
    """From 0 up to 1, the same whenever it is asked for."""
    return derive(0, "pause", run, attempt) / 2**63


def _response(failure: Failure, rules: Rules) -> Response:
    """A limit of the user's goes before what the wording says, and that before what the kind says."""
    response = RESPONSES.get(failure.kind, _STOP)
    if failure.kind in rules.limits:
        return response if response.budget else _RESTART
    if failure.wish == Action.restart:
        return response if response.budget in (Budget.restarts, Budget.preemptions) else _RESTART
    if failure.is_restart_useful and not response.budget:
        return _RESTART
    if failure.is_restart_useful is False and response.budget is Budget.restarts:
        return _STOP
    return response


def _is_hopeless(failure: Failure, history: Sequence[Failure], response: Response, rules: Rules) -> str:
    """Why no further attempt would help, whatever the budgets; '' if one may."""
    if response.is_about_the_job and failure.step is not None and rules.max_repeats > 0:
        same = [each for each in history if (each.signature, each.step) == (failure.signature, failure.step)]
        if len(same) + 1 >= rules.max_repeats:
            times = _times(len(same) + 1)
            return f"the same failure at step {failure.step:,} {times} (failures.max_repeats is {rules.max_repeats})"
    stuck = fruitless(history, failure)
    if 0 < rules.max_fruitless <= stuck:
        return f"{stuck} failures in a row, and no attempt came further (failures.max_fruitless)"
    return ""


def _limit(kind: str, response: Response, rules: Rules) -> tuple[str, int]:
    """The budget's key and size."""
    if kind in rules.limits:
        return f"failures.limits.{kind}", rules.limits[kind]
    if response.budget is Budget.restarts:
        return rules.restarts_key, rules.max_restarts
    return f"failures.{response.budget.value}", int(getattr(rules, response.budget.value))


def _used(failure: Failure, history: Iterable[Failure], rules: Rules) -> int:
    """How much of its budget is used up. A kind with a limit of its own takes of no other budget."""
    if failure.kind in rules.limits:
        return sum(each.kind == failure.kind for each in history)
    budget = _response(failure, rules).budget
    return sum(_response(each, rules).budget is budget for each in history if each.kind not in rules.limits)


def _action(response: Response, can: Abilities) -> Action:
    if response.remedy not in can.actions or (response.remedy is Action.shrink and can.workers <= 0):
        return Action.restart
    return response.remedy


def _restart(
    action: Action,
    failure: Failure,
    history: Sequence[Failure],
    rules: Rules,
    *,
    draw: float,
    can: Abilities,
    why: str,
    budget: str,
) -> Decision:
    pause = pause_before(fruitless(history, failure), len(history), rules, draw)
    changes = _changes(action, can)
    done, without = _DONE[action].format(workers=can.workers), ""
    if action is Action.rollback and can.rollback is not None:
        is_first = all(each.kind != failure.kind for each in history)
        changes = can.rollback.changes(is_first=is_first, may_skip=rules.skip, lr_factor=rules.lr_factor)
        done = can.rollback.words(changes)
    if avoided := avoided_nodes(failure, history, rules):
        changes["avoid"] = sorted(avoided)
        without = f", not on {', '.join(sorted(avoided.values()))}"
    words = f"{done}{without} after {pause:.1f} s ({why})"
    return Decision(action=action, after=pause, words=words, budget=budget, changes=changes)


def avoided_nodes(failure: Failure, history: Iterable[Failure], rules: Rules) -> dict[str, str]:
    """The nodes on which the next attempt shall not be, with what people call them: where failures that are about a
    machine came again, or one that a pattern of the user's blames on its node."""
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for each in (*history, failure):
        if not each.node or not (each.avoids_node or each.kind in OF_A_MACHINE):
            continue
        counts[each.node] = counts.get(each.node, 0) + 1
        if each.avoids_node or 0 < rules.avoid_after <= counts[each.node]:
            found[each.node] = each.host or each.node[:12]
    return found


def _changes(action: Action, can: Abilities) -> dict[str, Any]:
    if action is Action.shrink:
        return {"workers": can.workers}
    if action is Action.longer:
        return {"timeout": LONGER * can.timeout}
    return {"splits": 2 * can.splits} if action is Action.halve else {}


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _stop(why: str, *, budget: str = "") -> Decision:
    return Decision(words=f"not restarted: {why}", budget=budget)
