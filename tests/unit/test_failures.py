"""The first cause, not its echoes, in the order of what tells most. Real traces are in test_failure_traces.py."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from orchestrator.errors import ConfigError, RunFailed
from orchestrator.failures.classify import Evidence, FailureKind, first_cause, is_echo
from orchestrator.failures.explain import five_lines
from orchestrator.failures.rules import Pattern, patterns_of, signal_of
from orchestrator.records import RunStatus
from orchestrator.training.run import Run

ECHO = Evidence(
    rank=0, type="RuntimeError", message="[enforce fail at pair.cc] Connection closed by peer [127.0.0.1]:4312",
    traceback='File "/x/torch/distributed.py", line 3, in barrier',
)  # fmt: skip


@pytest.mark.parametrize(
    ("evidence", "kind", "status"),
    [
        (Evidence(rank=1, type="ValueError", message="bad", traceback="File"), FailureKind.user_bug, RunStatus.failed),
        (
            Evidence(rank=1, type="OutOfMemoryError", message="CUDA out of memory."),
            FailureKind.device_out_of_memory,
            RunStatus.failed,
        ),
        (
            Evidence(rank=1, type="ActorDiedError", message="the actor died"),
            FailureKind.worker_killed,
            RunStatus.crashed,
        ),
        (Evidence(rank=1, type="NodeDiedError", message="the node died"), FailureKind.node_lost, RunStatus.crashed),
        (
            Evidence(rank=1, type="ServiceUnavailable", message="the tracker is away", traceback="File"),
            FailureKind.service,
            RunStatus.failed,
        ),
        (Evidence(rank=1, type="Strange", message=""), FailureKind.unknown, RunStatus.failed),
    ],
)
def test_the_first_cause_is_found_behind_the_echo(evidence: Evidence, kind: FailureKind, status: RunStatus) -> None:
    finding = first_cause([ECHO, evidence])
    assert (finding.kind, finding.status, finding.evidence.rank) == (kind, status, 1)
    assert finding.reason.endswith("on rank 1")


def test_the_hint_names_the_users_own_line() -> None:
    traceback = (
        'File "/venv/site-packages/torch/nn.py", line 5, in forward\n  File "/home/me/train.py", line 17, in train\n'
        '  File "/venv/site-packages/torch/x.py", line 9, in linear'
    )
    finding = first_cause([Evidence(rank=0, type="RuntimeError", message="shapes", traceback=traceback)])
    assert finding.hint == "Raised in train at /home/me/train.py:17."


def test_a_failure_is_told_in_five_lines() -> None:
    finding = first_cause(
        [Evidence(rank=1, type="ActorDiedError", message="the actor died", host="node-7", step=120), ECHO]
    )
    done = "restarted from the newest checkpoint"
    error = {**finding.error(), "done": done, "log": "/runs/r/logs/attempt-1/rank-1.log"}
    assert five_lines(error) == [
        ("what", "worker killed: the worker process died without a word"),
        ("where", "rank 1, host node-7, step 120"),
        ("why", finding.hint),
        ("done", done),
        ("log", "/runs/r/logs/attempt-1/rank-1.log"),
    ]


def test_an_error_of_which_little_is_known_is_told_in_fewer_lines() -> None:
    assert five_lines({"type": "ConfigError", "message": "storage.url: no\nmore"}) == [
        ("what", "ConfigError: storage.url: no")
    ]


def test_rows_from_before_host_and_device_were_told_apart_still_read() -> None:
    error = {"kind": "out_of_memory", "type": "OutOfMemoryError", "message": "CUDA out of memory.", "rank": 1}
    assert FailureKind(error["kind"]) is FailureKind.out_of_memory
    assert five_lines(error)[0] == ("what", "out of memory: OutOfMemoryError: CUDA out of memory.")


def killed(rank: int, exit_code: int, log: str = "") -> Evidence:
    return Evidence(rank=rank, type="WorkerCrashed", message="the process has died", exit_code=exit_code, log=log)


@pytest.mark.parametrize(("exit_code", "signal"), [(-9, 9), (137, 9), (143, 15), (1, 0), (0, 0), (255, 0), (-300, 0)])
def test_an_exit_code_may_be_a_signal(exit_code: int, signal: int) -> None:
    assert signal_of(exit_code) == signal


def test_what_a_dead_process_had_printed_counts_only_where_its_words_are_unmistakable() -> None:
    said = "retrying after: Permission denied\nConnection reset by peer"
    assert first_cause([killed(0, -9, said)]).kind == FailureKind.worker_killed
    said = "Memory cgroup out of memory: Killed process 1"
    assert first_cause([killed(0, -9, said)]).kind == FailureKind.host_out_of_memory


def test_an_uncaught_exception_in_the_log_is_as_good_as_one_that_was_told() -> None:
    log = (
        'starting\nTraceback (most recent call last):\n  File "/home/me/train.py", line 3, in main\n    x = {}["a"]\n'
        "KeyError: 'a'"
    )
    finding = first_cause([killed(0, 1, log)])
    assert (finding.kind, finding.what) == (FailureKind.user_bug, "KeyError: 'a'")
    assert finding.hint == "Raised in main at /home/me/train.py:3."
    assert first_cause([killed(0, -9, log)]).kind == FailureKind.worker_killed, "caught, and then it was killed"


def test_the_one_that_others_waited_for_is_the_one_that_failed() -> None:
    waits = Evidence(rank=0, type="RuntimeError", message="[gloo] Timed out waiting 1800000ms for recv", host="a")
    finding = first_cause([waits], world_size=2)
    assert (finding.kind, finding.rank, finding.host) == (FailureKind.collective_timeout, 1, "")
    assert finding.reason == f"rank 0 waited for it in vain; RuntimeError: {waits.message} on rank 1"
    assert first_cause([waits]).rank == 0, "where nobody knows how many there are"


def test_a_bug_of_ours_is_told_from_one_of_the_users() -> None:
    ours = '  File "/venv/site-packages/orchestrator/training/run.py", line 9, in report\n    total += value\n'
    refusal = ours.replace("total += value", 'raise TypeError("a mapping is wanted")')
    users = '  File "/home/me/train.py", line 3, in train\n    run.report()\n'
    library = '  File "/venv/site-packages/torch/nn.py", line 7, in forward\n    raise x\n'

    def kind(*frames: str, last: str = "TypeError: x") -> str:
        traceback = "Traceback (most recent call last):\n" + "".join(frames) + last
        return first_cause([Evidence(rank=0, type="TypeError", message="x", traceback=traceback)]).kind

    assert kind(users, ours) == FailureKind.our_bug
    assert kind(ours, users) == FailureKind.user_bug
    assert kind(users, refusal) == FailureKind.user_bug
    assert kind(users, ours, library) == FailureKind.user_bug
    assert kind(users, ours, last="orchestrator.errors.NotFound: x") == FailureKind.user_bug, "told on purpose"


def test_users_patterns_come_before_our_rules() -> None:
    (pattern,) = patterns_of([{"match": r"filer-\d+ is away", "kind": "storage", "hint": "Ask Ada."}])
    assert pattern == Pattern(match=re.compile(r"filer-\d+ is away"), kind="storage", hint="Ask Ada.")
    raised = Evidence(rank=0, type="ValueError", message="filer-7 is away", traceback="File")
    printed = killed(0, 1, "one\nfiler-7 is away\nthree")
    for evidence in (raised, printed):
        finding = first_cause([evidence], patterns=[pattern])
        assert (finding.kind, finding.hint) == ("storage", "Ask Ada.")
    assert first_cause([raised]).kind == FailureKind.user_bug


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"match": "(", "kind": "storage"}, "failures.patterns.0.match"),
        ({"match": "a", "kind": "Bad luck"}, "failures.patterns.0.kind"),
        ({"match": "a", "kind": "node_los"}, "failures.patterns.0.kind"),
        ({"match": "a", "kind": "unknown"}, "failures.patterns.0.kind"),
        ({"match": "a"}, "failures.patterns.0"),
        ({"match": "a", "avoid_node": False}, "failures.patterns.0"),
        ({"match": "a", "avoid_node": "yes"}, "failures.patterns.0.avoid_node"),
        ({"match": "a", "kind": "hang", "action": "halve"}, "failures.patterns.0.action"),
        ({"match": "a", "kind": "hang", "do": "stop"}, "failures.patterns.0"),
        ("a", "failures.patterns.0"),
    ],
)
def test_a_pattern_that_cannot_work_is_refused(entry: object, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        patterns_of([entry])
    assert refused.value.key == key


def test_user_code_names_its_kind_of_failure() -> None:
    with pytest.raises(RunFailed) as raised:
        Run.fail(None, "data_error", "shard 7 is empty")  # type: ignore[arg-type]
    evidence = Evidence(
        rank=0, type="RunFailed", message=str(raised.value), traceback="File", kind=raised.value.failure_kind
    )
    finding = first_cause([evidence])
    assert (finding.kind, finding.what) == ("data_error", "shard 7 is empty")
    with pytest.raises(RunFailed) as raised:
        Run.fail(None, "bad_luck", "x")  # type: ignore[arg-type]
    own = first_cause([replace(evidence, kind=raised.value.failure_kind)])
    assert (own.kind, own.is_restart_useful, own.status) == ("bad_luck", False, RunStatus.failed)
    with pytest.raises(ConfigError, match="Did you mean data_error"):
        Run.fail(None, "data_eror", "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="small letters"):
        Run.fail(None, "bad luck", "x")  # type: ignore[arg-type]


def test_a_pattern_may_say_what_is_done_and_leave_the_kind_to_our_rules() -> None:
    stop, elsewhere, mine = patterns_of(
        [
            {"match": "rack 7 is off", "action": "stop"},
            {"match": "the cooling failed", "action": "restart", "avoid_node": True},
            {"match": "licence", "kind": "no_licence"},
        ]
    )
    patterns = (stop, elsewhere, mine)
    lost = Evidence(rank=2, type="NodeDiedError", message="the node died: rack 7 is off", host="n2", node="abc")
    told = first_cause([ECHO, lost], patterns=patterns)
    assert (told.kind, told.wish, told.avoids_node, told.rank) == (FailureKind.node_lost, "stop", False, 2)
    printed = replace(killed(1, -9, "one\nthe cooling failed in row 7"), node="def")
    found = first_cause([printed], patterns=patterns).error()
    assert (found["kind"], found["wish"], found["avoids_node"], found["node"]) == (
        "worker_killed", "restart", True, "def",
    )  # fmt: skip
    own = first_cause([Evidence(rank=0, type="ValueError", message="no licence", traceback="File")], patterns=patterns)
    assert (own.kind, own.is_restart_useful) == ("no_licence", False)
    named = Evidence(rank=0, type="RunFailed", message="rack 7 is off", kind="storage")
    assert first_cause([named], patterns=patterns).wish == "stop"
    assert not {"wish", "avoids_node", "node"} & first_cause([ECHO]).error().keys()


def test_a_rank_that_only_saw_another_fail_is_known_as_such() -> None:
    assert is_echo(ECHO)
    assert not is_echo(Evidence(rank=0, type="ValueError", message="bad", traceback="File"))


def test_a_message_as_large_as_a_file_is_judged_at_once() -> None:
    message = "nccl gloo found invalid values: " * 200_000 + "No space left on device"
    evidence = Evidence(rank=0, type="OSError", message=message, traceback="File")
    assert first_cause([evidence]).kind == FailureKind.storage
