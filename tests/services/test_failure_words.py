"""A failed run tells in five lines what, where, why, what was done and where the log is, wherever one looks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.backends.mlflow import MlflowSink
from orchestrator.records import RunStatus
from orchestrator.store.views import RunDetail
from orchestrator.tracking.copies import facts_of
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT

ORC = ("-m", "orchestrator.cli.main")


@pytest.fixture(scope="module")
def failed(local: LocalStack) -> RunDetail:
    """Rank 1 fails by `run.fail`, rank 0 waits for it in a collective."""
    local.run(*ORC, "run", "--local", "train=trains:empty_shard", "resources.workers=2", cwd=PROJECT, code=1)
    return local.store.run(local.store.runs(limit=1)[0].run)


def test_the_rank_that_failed_first_is_named_and_of_what(failed: RunDetail) -> None:
    assert failed.status is RunStatus.failed
    assert (failed.error["kind"], failed.error["rank"], failed.error["step"]) == ("data_error", 1, 1)
    assert failed.error["what"] == "shard 7 is empty"


def test_orc_show_tells_it_in_five_lines(local: LocalStack, failed: RunDetail) -> None:
    out, _ = local.run(*ORC, "show", failed.run, cwd=PROJECT)
    told = {line.split()[0]: line for line in out.partition("\nfailure\n")[2].splitlines()[:5]}
    assert list(told) == ["what", "where", "why", "done", "log"]
    assert "data error: shard 7 is empty" in told["what"]
    assert "rank 1, host " in told["where"]
    assert told["where"].endswith(", step 1")
    assert "Raised in empty_shard at " in told["why"]
    assert "not restarted" in told["done"]
    log = Path(told["log"].split()[1])
    assert "shard 7 is empty" in log.read_text()


def test_scripts_get_the_same_lines(local: LocalStack, failed: RunDetail) -> None:
    out, _ = local.run(*ORC, "show", failed.run, "--json", cwd=PROJECT)
    told = json.loads(out)["failure"]
    assert list(told) == ["what", "where", "why", "done", "log"]
    assert told["what"] == "data error: shard 7 is empty"


def test_it_is_an_event_of_the_run(local: LocalStack, failed: RunDetail) -> None:
    (event,) = [event for event in local.store.events(failed.run) if event.kind == "failure"]
    assert event.level == "error"
    assert event.message.startswith("data error: shard 7 is empty (rank 1, ")
    assert event.details["kind"] == "data_error"
    assert event.details["log"].endswith("rank-1.log")


def test_mlflow_gets_it_as_tags(local: LocalStack, failed: RunDetail) -> None:
    facts = facts_of(local.store.facts_after(failed.run))
    tags = MlflowSink("http://127.0.0.1:9").tags(facts)
    assert tags["orc.failure.kind"] == "data_error"
    assert tags["orc.failure.what"] == "data error: shard 7 is empty"
    assert tags["orc.failure.where"].startswith("rank 1, host ")
    assert tags["orc.failure.done"].startswith("not restarted")
    assert {"orc.failure.why", "orc.failure.log"} <= tags.keys()


def test_users_say_what_their_own_messages_mean(local: LocalStack) -> None:
    pattern = 'failures.patterns=[{match: "shapes of .* differ", kind: data_error, hint: "Ask Ada."}]'
    words = ("run", "--local", "train=trains:prints_and_dies", "resources.workers=2", pattern)
    local.run(*ORC, *words, cwd=PROJECT, code=1)
    run = local.store.run(local.store.runs(limit=1)[0].run)
    assert (run.error["kind"], run.error["rank"], run.error["hint"]) == ("data_error", 1, "Ask Ada.")


def test_a_pattern_for_a_mistyped_kind_is_refused_before_anything_starts(local: LocalStack) -> None:
    before = len(local.store.runs(limit=100))
    words = ("run", "--local", "train=trains:raises", "failures.patterns=[{match: x, kind: dataerror}]")
    _, err = local.run(*ORC, *words, cwd=PROJECT, code=2)
    assert "failures.patterns.0.kind" in err
    assert "data_error" in err
    assert len(local.store.runs(limit=100)) == before
