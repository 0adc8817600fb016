"""What follows a failed attempt: which budget it takes of, how long it waits, and when no further one is made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.errors import ConfigError
from orchestrator.failures.classify import FailureKind
from orchestrator.failures.policy import (
    RESPONSES,
    Abilities,
    Action,
    Course,
    Decision,
    Failure,
    Rules,
    decide,
    draw_of,
    fruitless,
    recalled,
)
from orchestrator.records import RunStatus

EVERYTHING = Abilities(actions=frozenset(Action), workers=3, splits=4, timeout=20.0)
CHANGES = {Action.shrink: {"workers": 3}, Action.halve: {"splits": 8}, Action.longer: {"timeout": 60.0}}


def failed(kind: str, step: int | None = None, what: str = "it failed") -> Failure:
    return Failure(status=RunStatus.failed, kind=kind, type="Error", what=what, step=step)


def follow(failure: Failure, *history: Failure, can: Abilities | None = None, **rules: object) -> Decision:
    return decide(failure, history, Rules(**rules), draw=0.0, can=can or Abilities())  # type: ignore[arg-type]


def test_every_kind_has_its_response() -> None:
    assert {kind.value for kind in FailureKind} <= set(RESPONSES)


@pytest.mark.parametrize("status", [RunStatus.finished, RunStatus.cancelled])
def test_nothing_follows_what_did_not_fail(status: RunStatus) -> None:
    assert decide(Failure(status=status, kind="worker_killed"), (), Rules(max_restarts=-1), draw=0.0) == Decision()


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("preemption", Action.shrink),
        ("node_lost", Action.shrink),
        ("worker_killed", Action.restart),
        ("device_fault", Action.restart),
        ("hang", Action.restart),
        ("storage", Action.restart),
        ("service", Action.restart),
        ("collective_timeout", Action.longer),
        ("device_out_of_memory", Action.halve),
        ("host_out_of_memory", Action.halve),
        ("diverged", Action.rollback),
        ("data_error", Action.stop),
        ("time_limit", Action.stop),
        ("user_bug", Action.stop),
        ("our_bug", Action.stop),
        ("unknown", Action.stop),
        ("of a later version", Action.stop),
    ],
)
def test_what_is_done_about_each_kind_where_everything_can_be_done(kind: str, action: Action) -> None:
    decision = follow(failed(kind, 5), can=EVERYTHING, max_restarts=1, max_halvings=1, max_rollbacks=1)
    assert decision.action is action
    assert decision.words.startswith("not restarted: " if action is Action.stop else ("restarted from", "rolled back"))
    assert decision.changes == CHANGES.get(action, {})


@pytest.mark.parametrize(
    ("kind", "action"),
    [
        ("node_lost", Action.restart),
        ("collective_timeout", Action.restart),
        ("device_out_of_memory", Action.stop),
        ("diverged", Action.stop),
    ],
)
def test_where_nothing_can_be_changed_only_what_may_end_otherwise_is_tried(kind: str, action: Action) -> None:
    assert follow(failed(kind, 5), max_restarts=1, max_halvings=1, max_rollbacks=1).action is action


def test_a_lost_node_takes_of_no_restart_and_a_restart_of_no_preemption() -> None:
    history = [failed("node_lost", 10), failed("preemption", 20), failed("worker_killed", 30)]
    lost = follow(failed("node_lost", 40), *history, max_restarts=1)
    assert (lost.action, lost.budget) == (Action.restart, "failures.max_preemptions")
    assert "restart 3, no limit: failures.max_preemptions" in lost.words
    killed = follow(failed("hang", 40), *history, max_restarts=2)
    assert "restart 2 of 2: failures.max_restarts" in killed.words
    over = follow(failed("hang", 40), *history, max_restarts=1)
    assert over.words == "not restarted: all 1 restarts for that (failures.max_restarts) are used up"
    assert not follow(failed("node_lost", 40), *history, max_preemptions=2).is_restart


def test_without_a_budget_the_way_to_go_on_is_said() -> None:
    words = follow(failed("worker_killed", 3)).words
    assert words == "not restarted: failures.max_restarts is 0; `orc resume` goes on from the newest checkpoint"


def test_a_kind_with_a_limit_of_its_own_takes_of_no_other_budget() -> None:
    limits = {"storage": 2, "data_error": 1, "hang": 0}
    history = [failed("storage", 10), failed("worker_killed", 20)]
    rules: dict[str, Any] = {"limits": limits, "max_restarts": 2}
    assert "restart 2 of 2: failures.limits.storage" in follow(failed("storage", 30), *history, **rules).words
    assert "restart 2 of 2: failures.max_restarts" in follow(failed("worker_killed", 30), *history, **rules).words
    assert follow(failed("data_error", 30), *history, **rules).is_restart
    assert follow(failed("my_licence", 30), limits={"my_licence": 1}).is_restart
    assert not follow(failed("data_error", 40), failed("data_error", 30), **rules).is_restart
    assert follow(failed("hang", 30), **rules).words.startswith("not restarted: failures.limits.hang is 0")


def test_a_limit_of_a_kind_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"failures.limits.node_los.*Did you mean node_lost"):
        Rules.of({"limits": {"node_los": 1}})
    assert Rules.of({"limits": {"node_lost": 1}, "max_restarts": 4, "grace": 20.0}).max_restarts == 4


@pytest.mark.parametrize(
    ("kind", "useful", "action"),
    [
        ("storage", False, Action.stop),  # the bucket is not there
        ("storage", True, Action.restart),
        ("data_error", True, Action.restart),  # a reader that took too long
        ("data_error", False, Action.stop),
        ("my_licence", True, Action.restart),
        ("my_licence", None, Action.stop),
        ("node_lost", False, Action.restart),
        ("diverged", True, Action.stop),
    ],
)
def test_the_wording_of_a_failure_goes_before_its_kind(kind: str, useful: bool | None, action: Action) -> None:
    failure = Failure(status=RunStatus.failed, kind=kind, is_restart_useful=useful)
    assert follow(failure, max_restarts=1).action is action
    assert follow(failure, failure, max_restarts=1).is_restart is (kind == "node_lost")


def test_the_same_failure_at_the_same_step_is_not_tried_a_third_time() -> None:
    first = failed("worker_killed", 1200, "died of SIGSEGV, pid 4711")
    again = failed("worker_killed", 1200, "died of SIGSEGV, pid 4899")
    decision = follow(again, failed("node_lost", 100), first, max_restarts=-1)
    words = "not restarted: the same failure at step 1,200 twice (failures.max_repeats is 2)"
    assert (decision.is_restart, decision.words) == (False, words)
    assert follow(again, first, max_restarts=-1, max_repeats=3).is_restart
    assert follow(again, first, max_restarts=-1, max_repeats=0).is_restart
    assert follow(again, failed("worker_killed", 1199, first.what), max_restarts=-1).is_restart
    assert follow(again, failed("worker_killed", 1200, "died of SIGKILL"), max_restarts=-1).is_restart


def test_memory_may_run_out_at_the_same_step_as_often_as_the_batch_is_halved() -> None:
    full = failed("device_out_of_memory", 0)
    for halved in range(4):
        decision = follow(full, *[full] * halved, can=EVERYTHING, max_halvings=3)
        assert decision.is_restart is (halved < 3)
    assert decision.words == "not restarted: all 3 restarts for that (failures.max_halvings) are used up"


def test_what_the_job_did_not_cause_or_whose_step_is_unknown_repeats_nothing() -> None:
    for failure in (failed("node_lost", 7), failed("service", 7), failed("worker_killed", None)):
        assert follow(failure, failure, max_restarts=-1).is_restart


def test_attempts_that_come_no_further_end_the_run_whatever_the_budget() -> None:
    lost = [failed("node_lost", step) for step in (50, 40, None, 50)]
    assert fruitless(lost, failed("node_lost", 49)) == 4
    assert fruitless(lost, failed("node_lost", 51)) == 0
    stopped = follow(failed("node_lost", 49), *lost, max_fruitless=4)
    assert stopped.words.startswith("not restarted: 4 failures in a row, and no attempt came further")
    assert follow(failed("node_lost", 51), *lost, max_fruitless=4).is_restart
    assert follow(failed("node_lost", 49), *lost, max_fruitless=0).is_restart


def test_collectives_get_more_time_once() -> None:
    slow = failed("collective_timeout", 5)
    assert follow(slow, can=EVERYTHING, max_restarts=-1).action is Action.longer
    words = follow(failed("collective_timeout", 9), slow, can=EVERYTHING, max_restarts=-1).words
    assert words == "not restarted: collective timeout again, after it was answered once"


def pauses(draw: float, *steps: int | None) -> list[float]:
    rules = Rules(max_restarts=-1, backoff=1.0, backoff_max=5.0, max_fruitless=0)
    failures = [failed("worker_killed", step) for step in steps]
    return [decide(each, failures[:n], rules, draw=draw).after for n, each in enumerate(failures)]


def test_the_pause_doubles_while_nothing_is_gained_and_begins_anew_with_progress() -> None:
    assert pauses(0.0, 10, 9, 8, 7, 6, 11, 5) == [0.5, 1.0, 2.0, 2.5, 2.5, 0.5, 1.0]
    assert pauses(0.5, 10, 9) == [0.75, 1.5]
    assert pauses(0.0, None, None) == [0.5, 1.0]


def test_the_random_part_differs_between_runs_and_replays() -> None:
    draws = [draw_of(f"r{number}", 1) for number in range(200)]
    assert draws == [draw_of(f"r{number}", 1) for number in range(200)]
    assert all(0 <= draw < 1 for draw in draws)
    assert 0.4 < sum(draws) / len(draws) < 0.6
    assert draw_of("r1", 1) != draw_of("r1", 2)


def test_a_failure_is_read_from_what_is_stored() -> None:
    error = {"kind": "hang", "type": "Ended", "what": "no progress", "message": "long", "step": 12, "rank": 1}
    told = Failure.of(RunStatus.failed, error)
    assert told == Failure(status=RunStatus.failed, kind="hang", type="Ended", what="no progress", step=12)
    assert Failure.of(RunStatus.failed, {"message": "no kind"}).kind == "unknown"


def test_a_pattern_of_the_users_goes_before_budgets_and_kinds() -> None:
    stopped = follow(replace(failed("node_lost", 5), wish="stop"))
    assert (stopped.is_restart, stopped.words) == (False, "not restarted: failures.patterns says so")
    wanted = replace(failed("user_bug", 5), wish="restart")
    assert follow(wanted, max_restarts=1).is_restart
    assert "(failures.max_restarts) are used up" in follow(wanted, failed("hang", 2), max_restarts=1).words
    assert follow(replace(failed("node_lost", 5), wish="restart")).budget == "failures.max_preemptions"
    assert follow(replace(wanted, kind="storage", is_restart_useful=False), max_restarts=1).is_restart


def test_a_node_on_which_a_machine_failed_again_is_avoided() -> None:
    on = [replace(failed("worker_killed", 10), node="a", host="n1"), replace(failed("storage", 20), node="a")]
    again = replace(failed("hang", 30), node="a", host="n1")
    rules: dict[str, Any] = {"max_restarts": -1}
    decision = follow(again, *on, **rules)
    assert decision.changes == {"avoid": ["a"]}
    assert decision.words.startswith("restarted from the newest checkpoint, not on n1 after ")
    assert follow(failed("worker_killed", 40), *on, again, **rules).changes == {"avoid": ["a"]}, "also from then on"
    assert follow(again, on[1], **rules).changes == {}, "storage says nothing of the node"
    assert follow(again, *on, **rules, avoid_after=3).changes == {}
    assert follow(again, *on, **rules, avoid_after=0).changes == {}
    assert follow(replace(again, node=""), *on, **rules).changes == {}, "nobody knows where"
    blamed = replace(failed("data_error", 5), node="b", wish="restart", avoids_node=True)
    assert follow(blamed, max_restarts=1, avoid_after=0).changes == {"avoid": ["b"]}, "the user says so"


def test_the_users_function_overrules_what_was_decided() -> None:
    course = Course(rules=Rules(max_restarts=1), history=[failed("hang", 2)], draw=0.0)
    over, bug = failed("hang", 5), failed("user_bug", 5)
    used_up = course.decided(over)
    assert not used_up.is_restart
    restarted = course.overruled(used_up, Action.restart, over)
    assert (restarted.action, restarted.after) == (Action.restart, 0.5)
    assert "failures.function says so" in restarted.words
    lost = course.decided(failed("node_lost", 5))
    assert course.overruled(lost, Action.stop, failed("node_lost", 5)).words.endswith("failures.function says so")
    assert course.overruled(lost, Action.restart, failed("node_lost", 5)) is lost
    with pytest.raises(ValueError, match="what can: restart, stop"):
        course.overruled(course.decided(bug), Action.halve, bug)
    halved = course.overruled(course.decided(bug, EVERYTHING), Action.halve, bug, EVERYTHING)
    assert halved.changes == {"splits": 8}


def stored(failure: Failure, decision: Decision) -> dict[str, Any]:
    return {"status": failure.status.value, "error": {**failure.to_json(), "decision": decision.to_json()}}


def test_the_next_driver_goes_on_with_the_failures_and_changes_of_the_one_before() -> None:
    full = replace(failed("device_out_of_memory", 3), node="a", is_restart_useful=False)
    halved = follow(full, can=EVERYTHING, max_halvings=5)
    lost = failed("node_lost", 9)
    shrunk = follow(lost, full, can=EVERYTHING)
    failures, changes = recalled([stored(full, halved), stored(lost, shrunk)])
    assert (failures, changes) == ((full, lost), {"splits": 8, "workers": 3})
    assert "restart 2 of 2: failures.max_halvings" in follow(full, *failures, can=EVERYTHING, max_halvings=2).words


def test_after_a_stop_and_after_the_end_failures_count_anew_and_remedies_stay() -> None:
    full, killed = failed("device_out_of_memory", 3), failed("worker_killed", 9)
    halved = follow(full, can=EVERYTHING, max_halvings=5)
    stopped = follow(killed, full, max_restarts=0)
    shrunk = follow(failed("node_lost", 4), can=EVERYTHING)
    before = [stored(full, halved), stored(failed("node_lost", 4), shrunk)]
    assert recalled([*before, stored(killed, stopped)]) == ((), {"splits": 8})
    assert recalled([*before, {"status": "FINISHED", "error": {}}]) == ((), {"splits": 8})
    assert recalled([*before, stored(killed, stopped), *before[:1]]) == ((full,), {"splits": 8})
    assert recalled([{"status": "FAILED", "error": {"type": "OSError"}}]) == ((), {}), "of an earlier version"
