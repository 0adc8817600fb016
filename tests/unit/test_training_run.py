"""The run object on one rank: steps, reports, resuming, and what is told to the record."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.backends.storage import Storage, UnsafePath
from orchestrator.checkpoints.engine import SaveFailed, StateRefused, TooLarge
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.clock import ManualClock
from orchestrator.errors import UserError
from orchestrator.examples import digits, first_job
from orchestrator.provenance.datasets import fingerprint
from orchestrator.provenance.fingerprint import data as data_fingerprint
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training import judging
from orchestrator.training.judging import Action
from orchestrator.training.run import Run, RunEnded, RunPaused, RunStopped
from tests.plugins.delayed_stager import DelayedStager

torch.set_num_threads(1)


class MemoryRecorder:
    """Keeps what a run records."""

    def __init__(self) -> None:
        self.points: list[tuple[int | None, dict[str, float]]] = []
        self.all_facts: list[Fact] = []
        self.stop_at: int | None = None

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        plain = {key: value.item() if isinstance(value, torch.Tensor) else value for key, value in metrics.items()}
        self.points.append((step, {key: float(value) for key, value in plain.items()}))

    def fact(self, fact: Fact) -> None:
        self.all_facts.append(fact)

    def stop_requested(self) -> bool:
        return self.stop_at is not None and bool(self.points) and (self.points[-1][0] or 0) >= self.stop_at

    def flush(self, timeout: float) -> bool:
        return True

    def facts(self, kind: FactKind) -> list[Mapping[str, Any]]:
        return [fact.data for fact in self.all_facts if fact.kind is kind]


def new_run(directory: Path, attempt: int = 1, **settings: Any) -> tuple[Run, MemoryRecorder]:
    recorder = MemoryRecorder()
    ticket = RunTicket(run="r1", name="brave-owl", experiment="e", attempt=attempt, directory=str(directory))
    return Run(ticket, recorder, **{"clock": ManualClock(), **settings}), recorder


# -- steps and reports ---------------------------------------------------------------------------------------


def test_log_counts_steps_and_report_records_at_the_last_one(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    run.log({"a": 1})
    run.log({"a": 2})
    run.report({"b": 3})
    run.log({"a": 4})
    assert [step for step, _ in recorder.points] == [1, 2, 2, 3]
    assert run.step == 3


def test_report_alone_counts_steps_too(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    for _ in range(3):
        run.report({"a": 1})
    assert [step for step, _ in recorder.points] == [1, 2, 3]


def test_a_given_step_is_kept_and_never_turns_the_count_back(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    run.log({"a": 1}, step=10)
    run.log({"a": 1}, step=3)
    run.log({"a": 1})
    assert [step for step, _ in recorder.points] == [10, 3, 11]


def test_report_saves_when_the_policy_says_so(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_steps=2, every_epochs=0, best_metric="acc", keep_last=0)
    run, recorder = new_run(tmp_path, checkpoints=policy)
    state = run.state(model=nn.Linear(1, 1))
    saved = [run.report({"acc": value}, state=state) for value in (0.5, 0.4, 0.3, 0.2, 0.6)]
    assert [info.step if info else None for info in saved] == [1, 2, None, 4, 5]
    assert [info.is_best for info in saved if info] == [True, False, False, True]
    assert [data["id"] for data in recorder.facts(FactKind.checkpoint)] == [info.id for info in saved if info]
    assert saved[0] is not None
    assert saved[0].metrics == {"acc": 0.5}


def test_best_true_saves_always(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path, checkpoints=CheckpointPolicy(every_epochs=0))
    state = run.state(model=nn.Linear(1, 1))
    info = run.report({}, state=state, best=True)
    assert info is not None
    assert info.is_best
    assert Path(info.uri, "MANIFEST.json").exists()


def test_minutes_are_those_of_the_clock(tmp_path: Path) -> None:
    clock = ManualClock()
    run, _ = new_run(tmp_path, checkpoints=CheckpointPolicy(every_epochs=0, every_minutes=1), clock=clock)
    state = run.state(model=nn.Linear(1, 1))
    assert run.report(state=state) is None
    clock.advance(60)
    assert run.report(state=state) is not None
    assert run.report(state=state) is None


def test_a_stop_saves_and_then_ends_the_training(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path, checkpoints=CheckpointPolicy(every_epochs=0))
    run.state(model=nn.Linear(1, 1))
    recorder.stop_at = 2
    run.report({"a": 1})
    with pytest.raises(RunStopped):
        run.report({"a": 1})
    assert [data["step"] for data in recorder.facts(FactKind.checkpoint)] == [2]


def test_except_exception_does_not_swallow_a_stop(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    recorder.stop_at = 0

    def careless() -> None:
        with suppress(Exception):
            run.report({"a": 1})

    with pytest.raises(RunStopped):
        careless()


def test_a_failing_periodic_save_is_an_event_and_an_asked_one_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, recorder = new_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert run.report({"a": 1}, state=state) is None
    outage, event = recorder.facts(FactKind.event)
    assert (outage["kind"], outage["level"], outage["details"]["service"]) == ("degraded", "warning", "storage")
    assert event["kind"] == "checkpoint-failed"
    assert event["level"] == "error"
    assert "No space left" in event["message"]
    with pytest.raises(SaveFailed, match="No space left"):
        run.save(state)


def test_a_state_that_cannot_be_stored_ends_the_training_at_once(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path)
    with pytest.raises(StateRefused, match="thing"):
        run.report({}, state=run.state(thing=object()))


def test_without_a_state_the_end_asks_nothing_of_the_other_ranks(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path, world_size=2)
    run.log({"a": 1})
    run.finish()  # a collective would fail here, and hang in a script in which this rank alone records


def test_a_run_that_is_told_so_leaves_the_random_generators_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist())
    new_run(tmp_path, seeds_generators=False)
    assert (random.getstate(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()) == before


def test_finish_saves_what_is_newer_than_the_last_checkpoint(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path, checkpoints=CheckpointPolicy(every_epochs=0, best_metric="never-given"))
    run.state(model=nn.Linear(1, 1))
    run.finish()
    assert recorder.facts(FactKind.checkpoint) == []
    run.log({"a": 1})
    run.finish()
    run.finish()
    assert [data["step"] for data in recorder.facts(FactKind.checkpoint)] == [1]
    assert recorder.facts(FactKind.event)[0]["kind"] == "best-metric-missing"


def test_a_metric_that_is_not_finite_is_told_as_text(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    run.report({"loss": float("nan")}, state=run.state(model=nn.Linear(1, 1)))
    assert recorder.facts(FactKind.checkpoint)[0]["metrics"] == {"loss": "nan"}


# -- resuming ------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def train(run: Run, epochs: int, *, every_batch: bool = False, die_at: int | None = None) -> nn.Module:
    """Shuffling, dropout, momentum, a schedule, running means: what makes a resume differ when it is forgotten."""
    torch.manual_seed(1)  # the data is the same always
    data = TensorDataset(torch.randn(50, 6), torch.randn(50, 2))
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 2))
    model, loader = run.prepare(model, DataLoader(data, batch_size=8, shuffle=True))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.8)
    state = run.state(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    torch.rand(3)  # draws between state and loop must not matter
    for _ in run.epochs(epochs):
        model.train()
        for inputs, targets in loader:
            loss = (model(inputs) - targets).square().mean() * (1 + random.random() + np.random.rand())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            run.log({"loss": loss.item()})
            if every_batch:
                run.report(state=state)
            if run.step == die_at:
                raise Interrupted
        model.eval()
        run.report({"val": model(data.tensors[0]).mean().item()}, state=state)
    return model


def uninterrupted(directory: Path, epochs: int) -> tuple[nn.Module, dict[tuple[int, str], float]]:
    run, recorder = new_run(directory, seed=3)
    return train(run, epochs), curve(recorder)


def curve(*recorders: MemoryRecorder) -> dict[tuple[int, str], float]:
    """Value by (step, key); what a later attempt did again must be the same."""
    points: dict[tuple[int, str], float] = {}
    for recorder in recorders:
        for step, metrics in recorder.points:
            for key, value in metrics.items():
                assert step is not None
                assert points.setdefault((step, key), value) == value
    return points


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize(
    ("policy", "every_batch", "die_at"),
    [
        ({}, False, 16),  # in the third epoch: the checkpoint is from the end of the second
        ({"every_steps": 3, "every_epochs": 0}, True, 17),  # in the middle of an epoch
        ({"every_steps": 7, "every_epochs": 0}, True, 14),  # right after the last batch of an epoch
    ],
)
def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, policy: dict[str, Any], every_batch: bool, die_at: int
) -> None:
    want, points = uninterrupted(tmp_path / "a", epochs=4)
    first, recorded = new_run(tmp_path / "b", seed=3, checkpoints=CheckpointPolicy(**policy))
    with pytest.raises(Interrupted):
        train(first, 4, every_batch=every_batch, die_at=die_at)
    second, continued = new_run(tmp_path / "b", attempt=2, seed=3, checkpoints=CheckpointPolicy(**policy))
    model = train(second, 4, every_batch=every_batch)
    assert_equal(model, want)
    assert curve(recorded, continued) == points
    assert len(continued.points) < len(points), "it did not start from the beginning"
    (resumed,) = [event for event in continued.facts(FactKind.event) if event["kind"] == "resumed"]
    assert resumed["details"]["is_exact"] is True


def test_a_run_that_was_complete_has_no_epochs_left(tmp_path: Path) -> None:
    want, _ = uninterrupted(tmp_path, epochs=2)
    run, recorder = new_run(tmp_path, attempt=2, seed=3)
    assert_equal(train(run, 2), want)
    assert recorder.points == []
    assert run.step == 14


def test_resume_false_starts_from_the_beginning(tmp_path: Path) -> None:
    uninterrupted(tmp_path, epochs=1)
    run, recorder = new_run(tmp_path, attempt=2, seed=3, resume=False)
    train(run, 1)
    assert recorder.points[0][0] == 1


def test_damage_falls_back_to_the_older_one_and_is_told(tmp_path: Path) -> None:
    want, _ = uninterrupted(tmp_path, epochs=3)
    newest = max((tmp_path / "checkpoints").glob("step_*"))
    data = (newest / "model" / "model-00001-of-00001.safetensors").read_bytes()
    (newest / "model" / "model-00001-of-00001.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    run, recorder = new_run(tmp_path, attempt=2, seed=3)
    assert_equal(train(run, 3), want)
    kinds = [event["kind"] for event in recorder.facts(FactKind.event)]
    assert kinds == ["checkpoint-quarantined", "checkpoint-fallback", "resumed"]
    told = [fact for fact in recorder.facts(FactKind.checkpoint) if fact["id"] == f"r1/{newest.name}"]
    assert [fact["state"] for fact in told] == ["committed", "quarantined"], "told again, then put aside"


def test_a_resume_that_is_not_exact_says_why(tmp_path: Path) -> None:
    uninterrupted(tmp_path, epochs=1)
    run, recorder = new_run(tmp_path, attempt=2, seed=4, config_hash="other")
    train(run, 2)
    event = recorder.facts(FactKind.event)[0]
    assert event["details"]["is_exact"] is False
    assert event["details"]["why"] == ["the config changed", "seed 3 then, 4 now"]


def test_the_best_value_survives_a_resume(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_epochs=0, best_metric="acc")
    for attempt, value, is_saved in ((1, 0.5, True), (2, 0.4, False), (3, 0.6, True)):
        run, _ = new_run(tmp_path, attempt=attempt, checkpoints=policy)
        state = run.state(model=nn.Linear(1, 1))
        assert (run.report({"acc": value}, state=state) is not None) == is_saved


def test_the_one_shuffled_loader_belongs_to_the_state(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path)
    dataset = TensorDataset(torch.arange(4))
    loader, other = run.prepare(DataLoader(dataset, shuffle=True), DataLoader(dataset))
    assert run.state().loader is loader
    assert run.state(loader=other).loader is other


# -- preparing -----------------------------------------------------------------------------------------------


def test_prepare_leaves_other_things_alone(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path)
    thing, model = object(), nn.Linear(1, 1)
    assert run.prepare(thing) is thing
    assert run.prepare(model, thing) == (model, thing)
    loader = run.prepare(DataLoader(TensorDataset(torch.arange(4))))
    assert run.prepare(loader) is loader


def test_accumulate_completes_a_step_every_n_batches_and_at_the_end(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path, accumulation_steps=3)
    model, loader = run.prepare(nn.Linear(1, 1), DataLoader(TensorDataset(torch.zeros(7, 1)), shuffle=True))
    completes = []
    for _ in loader:
        with run.accumulate(model) as is_complete:
            completes.append(is_complete)
    assert completes == [False, False, True, False, False, True, True]


def test_seeds_make_runs_repeatable_and_ranks_different(tmp_path: Path) -> None:
    def draws(seed: int) -> tuple[float, float, float]:
        new_run(tmp_path, seed=seed)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    assert draws(1) == draws(1)
    assert not set(draws(1)) & set(draws(2))


# -- the record ----------------------------------------------------------------------------------------------


def test_datasets_are_told_with_the_hash_of_all_of_them(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    run.dataset("digits", split="train", fingerprint=fingerprint(torch.from_numpy(numbers)), size=2)
    run.dataset("digits", split="test", uri="/data/test", details={"scale": math.inf})
    first, second = recorder.facts(FactKind.provenance)
    told = {"name": "digits", "split": "train", "fingerprint": fingerprint(numbers), "size": 2}
    assert first["datasets"] == {"digits/train": told}
    assert second["datasets"]["digits/test"]["details"] == {"scale": "inf"}
    assert second["fingerprint"] == {"data": data_fingerprint({**first["datasets"], **second["datasets"]})}
    assert fingerprint(torch.zeros(2, dtype=torch.bfloat16)) != fingerprint(torch.zeros(2, dtype=torch.float16))


def test_params_are_flat_and_plain(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    run.params({"optim": {"lr": 0.1, "betas": (0.9, 0.99)}, "n": np.int64(3), "x": float("inf"), "d": torch.float32})
    told = {data["name"]: data["value"] for data in recorder.facts(FactKind.param)}
    assert told == {"optim.lr": 0.1, "optim.betas": [0.9, 0.99], "n": 3, "x": "inf", "d": "torch.float32"}


def test_tags_notes_events_and_metrics_are_told(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    run.tags({"team": "a", "n": 1})
    run.note("it works")
    run.log({"a": 1})
    run.event("lr-drop", "plateau", lr=1e-4)
    run.metric("val/accuracy", unit="%", direction="max")
    assert recorder.facts(FactKind.tag) == [{"name": "team", "value": "a"}, {"name": "n", "value": "1"}]
    assert recorder.facts(FactKind.note) == [{"text": "it works"}]
    assert recorder.facts(FactKind.event) == [
        {"kind": "lr-drop", "message": "plateau", "level": "info", "step": 1, "details": {"lr": 1e-4}}
    ]
    assert recorder.facts(FactKind.metric) == [{"name": "val/accuracy", "unit": "%", "direction": "max"}]


@pytest.mark.parametrize("wrong", [{"direction": "up"}, {"reduction": "median"}])
def test_a_metric_that_means_nothing_is_refused(tmp_path: Path, wrong: dict[str, str]) -> None:
    run, _ = new_run(tmp_path)
    with pytest.raises(UserError, match=next(iter(wrong))):
        run.metric("a", **wrong)


def test_artifacts_are_copied_and_hashed(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path / "run")
    source = tmp_path / "table.csv"
    source.write_text("a,b\n")
    uri = run.artifact(source)
    run.artifact(b"x", "deep/blob")
    assert Path(uri) == tmp_path / "run" / "artifacts" / "table.csv"
    assert Path(uri).read_text() == "a,b\n"
    first, second = recorder.facts(FactKind.artifact)
    assert first["sha256"] == hashlib.sha256(b"a,b\n").hexdigest()
    assert (first["size_bytes"], first["media_type"]) == (4, "text/csv")
    assert second["name"] == "deep/blob"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../../x"])
def test_artifacts_stay_inside_the_run(tmp_path: Path, name: str) -> None:
    run, _ = new_run(tmp_path)
    with pytest.raises(UnsafePath):
        run.artifact(b"x", name)


def test_artifacts_that_cannot_be_are_named(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path)
    with pytest.raises(UserError, match="no-such-file"):
        run.artifact(tmp_path / "no-such-file")
    with pytest.raises(UserError, match="name"):
        run.artifact(b"x")


def test_figures_are_drawn_or_taken_as_they_are(tmp_path: Path) -> None:
    class Figure:
        def savefig(self, file: Any, format: str) -> None:
            file.write(format.encode())

    run, _ = new_run(tmp_path)
    assert Path(run.figure("curve", Figure())).read_bytes() == b"png"
    assert Path(run.figure("curve.svg", Figure())).read_bytes() == b"svg"
    assert Path(run.figure("photo.jpg", b"jpeg")).read_bytes() == b"jpeg"
    with pytest.raises(UserError, match="matplotlib"):
        run.figure("x", 1)


# -- examples ------------------------------------------------------------------------------------------------


def test_the_first_job_learns(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path)
    first_job.train(run, SimpleNamespace(epochs=3, lr=0.05))
    losses = [metrics["epoch_loss"] for _, metrics in recorder.points if "epoch_loss" in metrics]
    assert losses[-1] < losses[0] < 1


def test_without_scikit_learn_the_digits_job_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install 'ray-orchestrator\[demo\]'"):
        digits.datasets(0.2)


# -- where writing is another's ------------------------------------------------------------------------------


def staged_run(directory: Path, **policy: Any) -> tuple[Run, MemoryRecorder, DelayedStager]:
    stager = DelayedStager(Storage(str(directory / "checkpoints")))
    settings = CheckpointPolicy(**{"every_epochs": 0, "every_steps": 1, **policy})
    run, recorder = new_run(directory, stager=stager, checkpoints=settings)
    return run, recorder, stager


def step(run: Run, state: Any) -> Any:
    run.log({"a": 1.0})
    return run.report(state=state)


def test_a_report_does_not_wait_and_a_later_one_tells_what_became_durable(tmp_path: Path) -> None:
    run, recorder, stager = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    info = step(run, state)
    assert info.state.value == "staged"
    assert recorder.facts(FactKind.checkpoint) == []
    stager.write()
    step(run, state)
    (told,) = recorder.facts(FactKind.checkpoint)
    assert (told["id"], told["state"]) == (info.id, "committed")


def test_room_is_asked_for_again_once_the_optimizer_has_a_state(tmp_path: Path) -> None:
    run, _, stager = staged_run(tmp_path, every_steps=100)
    model = nn.Linear(30, 30)
    optimizer = torch.optim.Adam(model.parameters())
    state = run.state(model=model, optimizer=optimizer)
    for _ in range(2):
        model(torch.ones(1, 30)).sum().backward()
        optimizer.step()
        step(run, state)
    assert [layout.size_bytes // 4096 for layout in stager.expected] == [2, 5]


def test_one_that_failed_is_made_up_for_at_the_end(tmp_path: Path) -> None:
    run, recorder, stager = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    step(run, state)
    stager.fail("the disk is on fire")
    run.finish()
    assert [fact["reasons"] for fact in recorder.facts(FactKind.checkpoint)] == [("end",)]
    kinds = [event["kind"] for event in recorder.facts(FactKind.event)]
    assert kinds == ["checkpoint-failed", "degraded", "recovered"]


def test_a_storage_that_is_away_is_told_once_and_when_it_is_back(tmp_path: Path) -> None:
    run, recorder, stager = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    for _ in range(3):
        step(run, state)
        stager.fail("the disk is on fire")
    step(run, state)
    stager.write()
    step(run, state)
    kinds = [event["kind"] for event in recorder.facts(FactKind.event)]
    assert kinds == ["checkpoint-failed", "degraded", "checkpoint-failed", "checkpoint-failed"], "one is not enough"
    run.finish()
    (outage,) = [event for event in recorder.facts(FactKind.event) if event["kind"] == "recovered"]
    assert outage["details"]["failures"] == 3


def test_the_end_waits_for_what_is_staged(tmp_path: Path) -> None:
    run, recorder, _ = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    step(run, state)
    step(run, state)
    run.finish()
    assert [fact["step"] for fact in recorder.facts(FactKind.checkpoint)] == [1, 2], "and the end needs none of its own"


def test_a_stop_waits_until_all_is_durable(tmp_path: Path) -> None:
    run, recorder, _ = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    step(run, state)
    recorder.stop_at = 2
    with pytest.raises(RunStopped):
        step(run, state)
    assert [fact["state"] for fact in recorder.facts(FactKind.checkpoint)] == ["committed", "committed"]


def test_a_best_one_waits_for_room_and_a_periodic_one_is_skipped(tmp_path: Path) -> None:
    run, recorder, stager = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    for _ in range(2):
        step(run, state)
    assert step(run, state) is None
    assert [event["kind"] for event in recorder.facts(FactKind.event)] == ["checkpoint-skipped"]
    assert run.report(state=state, best=True) is None, "there was no room in the whole time"
    assert stager.patience[-1] == CheckpointPolicy().wait
    assert [event["kind"] for event in recorder.facts(FactKind.event)][1:] == ["degraded", "checkpoint-failed"]


def test_a_save_need_not_be_waited_for(tmp_path: Path) -> None:
    run, _, stager = staged_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    assert run.save(state, wait=False).state.value == "staged"
    assert run.save(state).state.value == "committed"
    assert stager.sealed == []


def test_a_state_that_is_too_large_is_told_once_and_training_goes_on(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_steps=1, every_epochs=0, max_gb=1e-9)
    run, recorder = new_run(tmp_path, checkpoints=policy)
    state = run.state(model=nn.Linear(10, 10))
    for _ in range(3):
        assert step(run, state) is None
    kinds = [event["kind"] for event in recorder.facts(FactKind.event)]
    assert kinds == ["checkpoint-too-large", "checkpoint-failed"]
    with pytest.raises(TooLarge):
        run.save(state)


def test_weights_alone_are_no_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path)
    state = run.state(model=nn.Linear(1, 1))
    run.log({"a": 1.0})
    assert not run.save(state, weights_only=True).resumable
    again, recorder = new_run(tmp_path, attempt=2)
    again.state(model=nn.Linear(1, 1))
    assert again.step == 0
    assert recorder.facts(FactKind.event) == []


def test_a_full_one_is_called_so(tmp_path: Path) -> None:
    policy = CheckpointPolicy(every_epochs=1, full_every_epochs=2, keep_last=0)
    run, recorder = new_run(tmp_path, checkpoints=policy)
    state = run.state(model=nn.Linear(1, 1))
    for _ in run.epochs(4):
        run.report({"a": 1.0}, state=state)
    told = recorder.facts(FactKind.checkpoint)
    assert [fact["kind"] for fact in told] == ["sharded", "full", "sharded", "full"]
    assert told[1]["reasons"] == ("every_epochs", "full_every_epochs")
    again, _ = new_run(tmp_path, attempt=2)
    again.state(model=nn.Linear(1, 1))
    assert again.epoch == 3


def test_extras_and_files_come_back(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path)
    run.save(run.state(model=nn.Linear(1, 1), extra={"best": 0.5}, files={"words": b"a b"}, seen=3))
    again, _ = new_run(tmp_path, attempt=2)
    state = again.state(model=nn.Linear(1, 1), extra={"best": 0.0}, seen=0)
    assert state.extra == {"best": 0.5, "seen": 3}
    assert state.files == {"words": b"a b"}


def test_how_long_training_stood_still_is_recorded_if_speed_is(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path, perf=True)
    run.log({"a": 1.0})
    run.save(run.state(model=nn.Linear(1, 1)))
    (stall,) = [values["perf/checkpoint_stall"] for _, values in recorder.points if "perf/checkpoint_stall" in values]
    assert stall > 0
    assert "perf/checkpoint_stall" in [fact["name"] for fact in recorder.facts(FactKind.metric)]


# -- paused and ended by a judge ---------------------------------------------------------------------------


NO_SAVES = CheckpointPolicy(every_epochs=0, at_end=False)
VALUE = [["val", "min"]]


def judged(**spec: Any) -> dict[str, Any]:
    return {"judge": judging.judge(spec)}


def test_a_pause_saves_whatever_the_policy_says_and_is_durable_before_it_is_raised(tmp_path: Path) -> None:
    stager = DelayedStager(Storage(str(tmp_path / "checkpoints")))
    spec = judged(until=2, objectives=VALUE, unit="epoch")
    run, recorder = new_run(tmp_path, checkpoints=NO_SAVES, stager=stager, **spec)
    with pytest.raises(RunPaused):
        train(run, 5)
    (saved,) = recorder.facts(FactKind.checkpoint)
    assert (saved["epoch"], saved["reasons"]) == (1, ("rung",))
    found = run.tally()["checkpoint"]
    assert found == {"name": "step_00000014-a1", "sha256": saved["manifest_sha256"], "step": 14}
    assert Path(tmp_path, "checkpoints", found["name"], "MANIFEST.json").exists()
    assert run.verdict.action is Action.pause


def test_paused_again_and_again_a_training_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, points = uninterrupted(tmp_path / "whole", 4)
    recorders, tally = [], {}
    for attempt, until in enumerate((1, 3, None), 1):
        spec = judged(until=until, objectives=VALUE, unit="auto")
        run, recorder = new_run(tmp_path / "parts", attempt, seed=3, checkpoints=NO_SAVES, **spec)
        recorders.append(recorder)
        if until is not None:
            with pytest.raises(RunPaused):
                train(run, 4)
            assert run.tally()["resource"] == until
        else:
            model = train(run, 4)
            run.finish()
            tally = run.tally()
    assert_equal(model, whole)
    assert curve(*recorders) == points
    assert [at for at, _ in tally["reports"]] == [1.0, 2.0, 3.0, 4.0]
    assert tally["last"] == {"val": points[28, "val"]}


def test_who_died_after_reaching_the_milestone_is_there_without_training(tmp_path: Path) -> None:
    spec = {"until": 2, "objectives": VALUE, "unit": "epoch"}
    first, _ = new_run(tmp_path, 1, checkpoints=NO_SAVES, **judged(**spec))
    with pytest.raises(RunPaused):
        train(first, 5)
    again, recorder = new_run(tmp_path, 2, checkpoints=NO_SAVES, **judged(**spec))
    with pytest.raises(RunPaused):
        train(again, 5)
    assert recorder.points == []
    assert again.tally() == first.tally()


def test_killed_on_the_way_to_the_milestone_the_tally_is_the_same(tmp_path: Path) -> None:
    spec = {"until": 3, "objectives": VALUE, "unit": "epoch"}
    tallies = []
    for name, deaths in (("straight", ()), ("killed", (10, 17))):
        for attempt, die_at in enumerate((*deaths, None), 1):
            run, _ = new_run(tmp_path / name, attempt, seed=3, **judged(**spec))
            with pytest.raises(Interrupted if die_at else RunPaused):
                train(run, 5, die_at=die_at)
        tallies.append({**run.tally(), "checkpoint": None})
    assert tallies[0] == tallies[1]
    assert len(tallies[0]["reports"]) == 3


def test_what_a_crash_left_of_the_tally_is_in_the_newest_checkpoint(tmp_path: Path) -> None:
    assert judging.tally_left(str(tmp_path)) == {}
    run, _ = new_run(tmp_path, **judged(until=9, objectives=VALUE, unit="epoch"))
    with pytest.raises(Interrupted):
        train(run, 5, die_at=17)  # in the third epoch
    left = judging.tally_left(str(tmp_path))
    assert left == {**run.tally(), "checkpoint": left["checkpoint"]}
    assert (left["resource"], left["checkpoint"]["step"]) == (2.0, 14)


def test_a_wish_to_stop_goes_before_a_pause(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path, **judged(until=1, objectives=VALUE, unit="report"))
    run.state(model=nn.Linear(1, 1))
    recorder.stop_at = 1
    with pytest.raises(RunStopped) as caught:
        run.report({"val": 1.0})
    assert type(caught.value) is RunStopped
    assert recorder.facts(FactKind.checkpoint)[0]["reasons"] == ("stop", "rung")


def test_without_a_state_a_pause_leaves_no_checkpoint_and_says_so(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path, **judged(until=1, objectives=VALUE, unit="report"))
    with pytest.raises(RunPaused):
        run.report({"val": 1.0})
    assert recorder.facts(FactKind.checkpoint) == []
    assert (run.tally()["has_state"], run.tally()["checkpoint"]) == (False, {})


def test_what_goes_on_after_a_pause_is_paused_again(tmp_path: Path) -> None:
    run, _ = new_run(tmp_path, **judged(until=1, objectives=VALUE, unit="report"))
    for _ in range(2):
        with pytest.raises(RunPaused):
            run.report({"val": 1.0})


def test_ended_early_there_is_no_further_epoch_and_the_rest_of_the_function_runs(tmp_path: Path) -> None:
    spec = {"stopping": {"metric": "val", "patience": 2}}
    run, recorder = new_run(tmp_path, checkpoints=CheckpointPolicy(keep_last=1), **judged(**spec))
    seen = []
    state = run.state(model=nn.Linear(1, 1))
    for epoch in run.epochs(10):
        seen.append(epoch)
        run.report({"val": 1.0}, state=state)
    run.report({"test": 0.5, "val": 0.0})
    run.finish()
    assert seen == [0, 1, 2]
    assert recorder.points[-1][1] == {"test": 0.5, "val": 0.0}
    reason = "no better val in 2 reports: the best is 1"
    assert [each["message"] for each in recorder.facts(FactKind.event) if each["kind"] == "stopped-early"] == [reason]
    tally = run.tally()
    assert (tally["verdict"], tally["reason"], tally["last"]) == ("end", reason, {"val": 1.0})
    assert tally["checkpoint"]["step"] == 4

    resumed, recorder = new_run(tmp_path, 2, **judged(**spec))
    resumed.state(model=nn.Linear(1, 1))
    assert list(resumed.epochs(10)) == []
    assert resumed.tally()["reason"] == reason
    longer, _ = new_run(tmp_path, 3, **judged(stopping={"metric": "val", "patience": 4}))
    longer.state(model=nn.Linear(1, 1))
    assert list(longer.epochs(10)) == [3, 4, 5, 6, 7, 8, 9]


def test_ended_early_a_loop_of_its_own_is_left_by_an_exception_that_saves(tmp_path: Path) -> None:
    spec = {"stopping": {"target": 0.5}}
    run, recorder = new_run(tmp_path, checkpoints=CheckpointPolicy(every_epochs=0), **judged(**spec))
    state = run.state(model=nn.Linear(1, 1))
    run.report({"val/loss": 0.9}, state=state)
    with pytest.raises(RunEnded):
        run.report({"val/loss": 0.4}, state=state)
    run.finish()  # as the launcher does
    assert [each["step"] for each in recorder.facts(FactKind.checkpoint)] == [2]
    again, _ = new_run(tmp_path, 2, **judged(**spec))
    with pytest.raises(RunEnded):
        again.state(model=nn.Linear(1, 1))


def test_what_shall_judge_and_was_never_reported_is_an_event(tmp_path: Path) -> None:
    run, recorder = new_run(tmp_path, **judged(objectives=[["val/acuracy", "max"]], until=None))
    run.report({"val/accuracy": 0.5})
    run.finish()
    (event,) = recorder.facts(FactKind.event)
    assert (event["kind"], event["message"].split(" ")[0]) == ("objective-missing", "val/acuracy")
