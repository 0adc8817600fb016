"""How fast a rank goes: windows, what they hold, and what a run records of it."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.records import FactKind, RunTicket
from orchestrator.training.pace import METRICS, Pace, peak_memory, samples_in
from orchestrator.training.run import Run
from tests.unit.test_training_run import MemoryRecorder


class Rank:
    """A pace with a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recorded: list[dict[str, float]] = []
        self.steps: list[int] = []
        self.pace = Pace(self.record, lambda: 1e6, clock=lambda: self.now)

    def record(self, values: dict[str, float]) -> None:
        self.recorded.append(values)
        self.steps.append(self.pace._steps)

    def train(self, batches: int, *, load: float, compute: float, size: int = 4) -> None:
        def loader() -> Iterator[Any]:
            for _ in range(batches):
                self.now += load
                yield [torch.zeros(size, 2), torch.zeros(size)]

        for _ in self.pace.timed(loader()):
            self.now += compute


def test_a_window_has_means_and_the_slowest_step() -> None:
    rank = Rank()
    rank.train(1, load=0.25, compute=1.0)
    assert rank.recorded == [
        {
            "perf/step_time": 1.25, "perf/step_time_max": 1.25, "perf/data_wait": 0.25,
            "perf/samples_per_second": 4 / 1.25, "perf/peak_memory_bytes": 1e6,
        }
    ]  # fmt: skip
    rank.train(3, load=0.1, compute=0.1)
    rank.train(1, load=0.1, compute=0.6)
    rank.pace.close()
    assert rank.recorded[1:] == [
        pytest.approx(
            {
                "perf/step_time": 1.3 / 4, "perf/step_time_max": 0.7, "perf/data_wait": 0.1,
                "perf/samples_per_second": 16 / 1.3, "perf/peak_memory_bytes": 1e6,
            }
        )
    ]  # fmt: skip
    rank.pace.close()
    assert len(rank.recorded) == 2, "nothing new, nothing recorded"


def test_points_come_about_once_a_second_however_short_the_steps() -> None:
    rank = Rank()
    rank.train(20_000, load=0.0, compute=0.001)
    assert 9 <= len(rank.recorded) <= 20


def test_ranks_in_step_record_the_same_steps_although_their_clocks_differ() -> None:
    fast, slow = Rank(), Rank()
    fast.train(10_000, load=0.0, compute=0.0010)
    slow.train(10_000, load=0.0, compute=0.0011)
    assert len(slow.steps) > 3
    assert set(slow.steps) & set(fast.steps) == set(slow.steps)


def test_steps_that_become_slow_are_recorded_more_often_again() -> None:
    rank = Rank()
    rank.train(5000, load=0.0, compute=0.001)
    begun = len(rank.recorded)
    rank.train(4096, load=0.0, compute=0.1)
    assert len(rank.recorded) - begun > 4096 * 0.1 / 8


def test_a_pause_between_passes_is_no_step() -> None:
    rank = Rank()
    rank.train(2, load=0.0, compute=1.0)
    rank.now += 100.0
    rank.train(2, load=0.0, compute=1.0)
    assert {values["perf/step_time_max"] for values in rank.recorded} == {1.0}


def test_without_a_loader_the_steps_that_are_logged_count() -> None:
    rank = Rank()
    for _ in range(5):
        rank.pace.logged()
        rank.now += 2.0
    assert [sorted(values) for values in rank.recorded] == [
        ["perf/peak_memory_bytes", "perf/step_time", "perf/step_time_max"]
    ] * 4
    assert {values["perf/step_time"] for values in rank.recorded} == {2.0}
    rank.train(1, load=0.0, compute=1.0)
    rank.pace.logged()
    assert rank.recorded[-1]["perf/step_time"] == 1.0, "a loader knows better"


Pair = namedtuple("Pair", "x y")


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5), ([torch.zeros(3, 2), torch.zeros(9)], 3), ({"x": torch.zeros(7)}, 7),
        (Pair(torch.zeros(2), 1), 2), ((({"a": torch.zeros(6)},),), 6), (torch.tensor(1.0), 1), ("text", 0), ([], 0),
        ({}, 0),
    ],
)  # fmt: skip
def test_the_size_of_a_batch_is_the_length_of_its_first_tensor(batch: Any, size: int) -> None:
    assert samples_in(batch) == size


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_which_may_have_no_shape_are_counted(layout: torch.layout) -> None:
    assert samples_in([torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)]) == 2


def test_the_most_memory_of_this_process_is_known() -> None:
    held = bytearray(64 << 20)
    assert peak_memory(torch.device("cpu"))() > len(held)


# -- as a run records it


def run_of(directory: Path, **settings: Any) -> tuple[Run, MemoryRecorder]:
    recorder = MemoryRecorder()
    ticket = RunTicket(run="r", attempt=1, name="n", experiment="e", directory=str(directory))
    return Run(ticket, recorder, seed=1, device="cpu", **settings), recorder


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    data = TensorDataset(torch.zeros(10, 2))
    return DataLoader(data, batch_size=4, shuffle=True), DataLoader(data, batch_size=2)


def perf_of(recorder: MemoryRecorder) -> list[tuple[int | None, dict[str, float]]]:
    return [(step, point) for step, point in recorder.points if "perf/step_time" in point]


def test_a_short_run_has_its_first_pass_and_what_is_left_at_the_end(tmp_path: Path) -> None:
    run, recorder = run_of(tmp_path, perf=True)
    train, _ = run.prepare(*loaders())
    for _ in run.epochs(3):
        for _batch in train:
            run.log({"loss": 1.0})
        run.report({"accuracy": 0.5})
    run.finish()
    first, last = perf_of(recorder)
    assert (first[0], last[0]) == (3, 9), "at the run's current step"
    assert first[1].keys() == METRICS.keys()
    assert first[1]["perf/samples_per_second"] == pytest.approx(10 / 3 / first[1]["perf/step_time"], rel=1e-6)
    declared = {data["name"]: data for data in recorder.facts(FactKind.metric)}
    assert declared.keys() == METRICS.keys(), "each once"
    assert declared["perf/step_time"] == {
        "name": "perf/step_time",
        "unit": "s",
        "direction": "min",
        "reduction": "mean",
    }


def test_evaluations_are_no_steps(tmp_path: Path) -> None:
    run, recorder = run_of(tmp_path, perf=True)
    train, valid = run.prepare(*loaders())
    for _ in valid:  # in sequence, where the training is shuffled
        pass
    with torch.no_grad():
        for _ in train:  # without gradients
            pass
    run.finish()
    assert perf_of(recorder) == []


def test_a_loader_that_is_not_shuffled_is_the_training_where_no_other_is(tmp_path: Path) -> None:
    run, recorder = run_of(tmp_path, perf=True)
    _, loader = loaders()
    for _ in run.prepare(loader):
        run.log({"loss": 1.0})
    assert len(perf_of(recorder)) == 1


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    run, recorder = run_of(tmp_path, perf=False)
    train, _ = run.prepare(*loaders())
    for _ in train:
        run.log({"loss": 1.0})
    run.finish()
    assert perf_of(recorder) == []
    assert recorder.facts(FactKind.metric) == []
