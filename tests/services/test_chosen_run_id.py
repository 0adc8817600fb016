"""A run whose id was chosen by who submitted its job: one run, however often the job is started."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from orchestrator.errors import ConfigError, RunExists, RunIsActive
from orchestrator.records import RunSpec, RunStatus, RunTicket
from orchestrator.store.names import run_id
from orchestrator.store.store import Store

NOW = 1_700_000_000.0


@pytest.fixture
def store(schema_url: str) -> Iterator[Store]:
    store = Store(schema_url)
    yield store
    store.close()


@pytest.fixture
def spec() -> RunSpec:
    return RunSpec(experiment=f"e{uuid.uuid4().hex[:8]}", new_run=run_id(NOW), config_hash="a" * 64, job="job-1")


def opened(store: Store, spec: RunSpec) -> RunTicket:
    return store.open_attempt(spec, now=NOW, lease_seconds=30)


def test_the_new_run_has_the_id_that_was_chosen(store: Store, spec: RunSpec) -> None:
    ticket = opened(store, spec)
    assert (ticket.run, ticket.attempt) == (spec.new_run, 1)
    assert store.run(spec.new_run).job == "job-1"


def test_a_job_that_is_started_again_goes_on_with_its_run(store: Store, spec: RunSpec) -> None:
    first = opened(store, spec)
    with pytest.raises(RunIsActive):
        opened(store, spec)
    store.transition(first.run, first.attempt, RunStatus.crashed, now=NOW)
    assert opened(store, spec) == RunTicket(
        run=first.run, name=first.name, experiment=first.experiment, attempt=2, directory=first.directory
    )


def test_a_run_that_finished_or_did_other_work_is_left_alone(store: Store, spec: RunSpec) -> None:
    ticket = opened(store, spec)
    store.transition(ticket.run, ticket.attempt, RunStatus.failed, now=NOW)
    with pytest.raises(RunExists, match="another config"):
        opened(store, RunSpec(experiment=spec.experiment, new_run=spec.new_run, config_hash="b" * 64))
    opened(store, spec)
    store.transition(ticket.run, 2, RunStatus.finished, now=NOW)
    with pytest.raises(RunExists, match="FINISHED"):
        opened(store, spec)
    assert len(store.attempts(ticket.run)) == 2


@pytest.mark.parametrize("text", ["mine", "20261121-081530", "../../etc", "20261121-081530-a1b2c3dX"])
def test_not_every_text_is_an_id(store: Store, spec: RunSpec, text: str) -> None:
    with pytest.raises(ConfigError):
        opened(store, RunSpec(experiment=spec.experiment, new_run=text))


def test_of_jobs_that_start_at_the_same_time_one_gets_the_run(store: Store, spec: RunSpec, schema_url: str) -> None:
    def attempt(_: int) -> str:
        mine = Store(schema_url)
        try:
            return opened(mine, spec).run
        except RunIsActive:
            return ""
        finally:
            mine.close()

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(attempt, range(4)))
    assert sorted(got) == ["", "", "", spec.new_run]
