"""The first cause, not its echoes; and whether another attempt may help."""

from __future__ import annotations

import pytest

from orchestrator.failures.classify import Evidence, FailureKind, after, first_cause
from orchestrator.failures.explain import five_lines
from orchestrator.records import RunStatus

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
            FailureKind.out_of_memory,
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


@pytest.mark.parametrize(
    ("status", "kind", "restarts", "most", "expected"),
    [
        (RunStatus.crashed, "worker_killed", 0, 1, True),
        (RunStatus.crashed, "worker_killed", 1, 1, False),
        (RunStatus.crashed, "node_lost", 99, -1, True),
        (RunStatus.failed, "user_bug", 0, -1, False),
        (RunStatus.cancelled, "worker_killed", 0, -1, False),
        (RunStatus.finished, "", 0, -1, False),
    ],
)
def test_only_what_a_restart_can_mend_is_restarted(
    status: RunStatus, kind: str, restarts: int, most: int, expected: bool
) -> None:
    decision = after(status, {"kind": kind}, restarts, most)
    assert decision.is_restart is expected
    if status in (RunStatus.failed, RunStatus.crashed):
        assert decision.words.startswith("restarted" if expected else "not restarted")
    else:
        assert not decision.words


def test_a_failure_is_told_in_five_lines() -> None:
    finding = first_cause(
        [Evidence(rank=1, type="ActorDiedError", message="the actor died", host="node-7", step=120), ECHO]
    )
    decision = after(finding.status, finding.error(), restarts=0, most=2)
    error = {**finding.error(), "done": decision.words, "log": "/runs/r/logs/attempt-1/rank-1.log"}
    assert five_lines(error) == [
        ("what", "worker killed: the worker process died without a word"),
        ("where", "rank 1, host node-7, step 120"),
        ("why", finding.hint),
        ("done", "restarted from the newest checkpoint (restart 1 of 2)"),
        ("log", "/runs/r/logs/attempt-1/rank-1.log"),
    ]


def test_an_error_of_which_little_is_known_is_told_in_fewer_lines() -> None:
    assert five_lines({"type": "ConfigError", "message": "storage.url: no\nmore"}) == [
        ("what", "ConfigError: storage.url: no")
    ]
