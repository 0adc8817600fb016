"""What counts as a training that goes wrong, and what follows when it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.clock import ManualClock
from orchestrator.records import Fact, FactKind, RunTicket
from orchestrator.training.gradients import GradientNorms
from orchestrator.training.guards import (
    Diverged,
    Divergence,
    Explosion,
    Finding,
    GuardRules,
    Guards,
    Look,
    MemoryGrowth,
    Rule,
)
from orchestrator.training.run import Run
from orchestrator.training.watching import MEMORY_PAUSE, Watch, Watching

NAN = math.nan
MB = 1e6


def first_word(rule: Any, values: Sequence[float]) -> int | None:
    """The number, from 1, of the value at which the rule says something."""
    return next((number for number, value in enumerate(values, 1) if rule.reported(value)), None)


# -- the rules


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ([1.0] * 5 + [2.0] * 5, None),  # exactly twice is not more than twice
        ([1.0] * 5 + [2.0] * 4 + [2.01], 10),
        ([1.0] * 5 + [9.0] * 4, None),  # needs ten
        ([1.0] * 9 + [7.0], 10),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2, 0.1], None),
        ([1.0] * 30 + [1.0, NAN, math.inf, 1.0], None),  # what is no number is another rule's
        ([0.0] * 5 + [1.0] * 5, None),  # nothing can be said of a multiple of nothing
        ([-4.0] * 5 + [-0.5] * 5, None),
        ([-4.0] * 5 + [0.5] * 5, 10),
    ],
)
def test_a_loss_diverges_when_its_last_five_are_twice_the_five_before(values: list[float], at: int | None) -> None:
    assert first_word(Divergence(5, 2.0), values) == at


def test_gradients_explode_when_three_in_a_row_are_far_beyond_the_usual() -> None:
    calm = [1.0, 2.0, 1.5] * 4
    assert first_word(Explosion(100.0), [*calm, 200.0, 1.0, 200.0, 200.0, 1.0]) is None
    assert first_word(Explosion(100.0), [*calm, 200.0, 300.0, 250.0]) == len(calm) + 3
    assert first_word(Explosion(100.0), [1.0] * 9 + [500.0] * 3) is None, "what is usual is not known yet"


def test_memory_that_rises_steadily_is_told_and_what_fills_or_wavers_is_not() -> None:
    def found(sizes: Sequence[float]) -> list[str]:
        rule = MemoryGrowth(0.25, int(200 * MB))
        return [what for step, size in enumerate(sizes) if (what := rule.reported(10.0 * step, size * MB))]

    leak = found([1000 + 20 * step for step in range(20)])
    assert leak == ["the memory in use grew by 380 MB in 190 steps (2 MB a step), to 1380 MB"]
    assert found([1000 + 20 * step + (300 if step == 7 else 0) for step in range(20)]), "a peak hides no leak"
    assert not found([1000 + 20 * step for step in range(19)]), "not enough to tell"
    assert not found([200, 800, 1000] + [1400] * 17), "it filled up"
    assert not found([1000 + 400 * (step % 2) for step in range(30)]), "it wavers"
    assert not found([10_000 + 20 * step for step in range(20)]), "a small share"
    assert not found([100 + 5 * step for step in range(20)]), "little in all"


# -- all together


def said(guards: Guards, *reports: Mapping[str, float]) -> list[list[Finding]]:
    return [guards.reported(metrics, step) for step, metrics in enumerate(reports, 1)]


def test_a_finding_is_told_once_and_again_after_all_was_well() -> None:
    guards = Guards(GuardRules())
    nan = Finding(Rule.finite, "train/loss", "train/loss is nan")
    assert said(guards, {"train/loss": 1.0}, {"train/loss": NAN}, {"train/loss": NAN}) == [[], [nan], []]
    assert guards.good == 1
    assert guards.reported({"acc": 1.0}, 4) == []
    assert guards.good == 1, "nobody has seen the loss since"
    assert guards.reported({"train/loss": 1.0}, 5) == []
    assert guards.good == 5
    assert guards.reported({"train/loss": NAN}, 6) == [nan]


def test_only_losses_are_watched_by_their_name_or_as_they_are_named() -> None:
    odd = {"val/Loss": NAN, "perplexity": math.inf, "accuracy": NAN, "cost": NAN}
    assert [each.key for each in Guards(GuardRules()).reported(odd, 1)] == ["val/Loss", "perplexity"]
    assert [each.key for each in Guards(GuardRules(losses=("cost",))).reported(odd, 1)] == ["cost"]


def test_norms_that_are_no_numbers_or_explode_are_findings() -> None:
    guards = Guards(GuardRules())
    assert guards.reported({}, 1, looks=[Look(1.0)] * 12) == []
    wrong = guards.reported({}, 2, looks=list(map(Look, [math.inf, 5000.0, 5000.0, 5000.0])))
    assert [(each.rule, each.key) for each in wrong] == [(Rule.finite, "gradients"), (Rule.gradients, "gradients")]
    assert (guards.good, guards.reported({}, 3), guards.good) == (1, [], 1)
    assert guards.reported({}, 4, looks=[Look(1.0)]) == []
    assert guards.good == 4


def test_memory_is_looked_at_now_and_then_and_ends_nothing() -> None:
    told: list[Finding] = []
    sizes = iter([1000 * MB + 50 * MB * step for step in range(20)])
    clock = ManualClock()
    watching = Watching(Watch(warns=("memory",), every=0), told.append, lambda: next(sizes), clock)
    for step in range(40):
        assert watching.reported({"loss": NAN}, step) is None
        clock.advance(MEMORY_PAUSE / 2)
    assert [each.rule for each in told] == [Rule.memory]
    assert next(sizes, None) is None


# -- gradients


def test_the_norm_of_all_gradients_is_taken_before_every_so_many_steps() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = GradientNorms(every=3)
    norms.watch(optimizer, {"again": optimizer}, 7)
    for factor in range(1, 8):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, float(factor))
        optimizer.step()
    assert [each.norm for each in norms.take()] == pytest.approx([factor * math.sqrt(8) for factor in (1, 4, 7)])
    assert norms.take() == []


def test_fast_steps_are_looked_at_no_more_often_than_slow_ones_unless_each_step_is() -> None:
    def looked_at(every: int, step_time: float) -> list[float]:
        clock = ManualClock()
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=0.0)
        norms = GradientNorms(every=every, rest=0.25, now=clock.monotonic)
        norms.watch(optimizer)
        for factor in range(1, 14):
            weight.grad = torch.full_like(weight, float(factor))
            optimizer.step()
            clock.advance(step_time)
        return [each.norm for each in norms.take()]

    assert looked_at(3, 0.0625) == [1.0, 7.0, 13.0], "0.375 s apart: the first third step after 0.25 s"
    assert looked_at(3, 0.125) == [1.0, 4.0, 7.0, 10.0, 13.0]
    assert looked_at(1, 0.0625) == [float(factor) for factor in range(1, 14)]


def test_nothing_is_made_of_gradients_that_are_not_there_sparse_or_scaled() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    norms = GradientNorms(every=1)
    norms.watch(optimizer)
    optimizer.step()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    scaled: Any = optimizer
    scaled.found_inf = torch.ones(1)
    scaled.register_step_pre_hook(lambda *_: delattr(scaled, "found_inf"))  # this optimizer is no fused one
    scaled.step()
    assert norms.take() == []

    table = nn.Embedding(4, 2, sparse=True)
    sparse = torch.optim.SparseAdam(table.parameters())
    norms.watch(sparse)
    table(torch.tensor([1])).sum().backward()
    sparse.step()
    assert len(norms.take()) <= 1


def test_the_norm_of_half_precision_gradients_does_not_overflow() -> None:
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    weight.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    norms = GradientNorms(every=1)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    norms.watch(optimizer)
    optimizer.step()
    assert [each.norm for each in norms.take()] == pytest.approx([120000.0], rel=1e-3)


# -- in a run


class Recorder:
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None: ...

    def fact(self, fact: Fact) -> None:
        if fact.kind is FactKind.event:
            self.events.append(fact.data)

    def stop_requested(self) -> bool:
        return False

    def flush(self, timeout: float) -> bool:
        return True


def trained(
    directory: Path, watch: Watch | None, loss_at: Callable[[int], float], *, spoils: bool = False
) -> tuple[Run, Recorder]:
    """Six steps, saved at each. `spoils`: what is no number in the loss is none in the gradients."""
    recorder = Recorder()
    ticket = RunTicket(run="r1", name="n", experiment="e", attempt=1, directory=str(directory))
    policy = CheckpointPolicy(every_steps=1, every_epochs=0, keep_last=0)
    run = Run(ticket, recorder, checkpoints=policy, watch=watch, clock=ManualClock())
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = run.state(model=model, optimizer=optimizer)
    try:
        for step in range(1, 7):
            optimizer.zero_grad()
            (model(torch.ones(1, 1)).sum() * (loss_at(step) if spoils else 1.0)).backward()
            optimizer.step()
            run.report({"loss": loss_at(step)}, state=state)
    except Diverged as error:
        run.rescue(error)
        raise
    finally:
        run.close()
    return run, recorder


def saved(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob("checkpoints/*/MANIFEST.json"))


def nan_at_four(step: int) -> float:
    return NAN if step == 4 else 1.0


def test_what_a_guard_finds_is_an_event_and_training_goes_on(tmp_path: Path) -> None:
    run, recorder = trained(tmp_path, Watch(warns=("finite",), every=1), nan_at_four, spoils=True)
    found = [(event["step"], event["level"], event["details"]) for event in recorder.events if event["kind"] == "guard"]
    assert found[:2] == [
        (4, "warning", {"rule": "finite", "key": "loss"}), (4, "warning", {"rule": "finite", "key": "gradients"}),
    ]  # fmt: skip
    assert run.step == 6


def test_an_attempt_that_is_to_fail_does_so_in_that_report_and_saves_nothing_of_it(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"loss is nan.*step 4; all was well at step 3") as raised:
        trained(tmp_path, Watch(fails=("finite",), every=0), nan_at_four)
    assert (raised.value.failure_kind, raised.value.step, raised.value.good) == ("diverged", 4, 3)
    assert saved(tmp_path) == [f"step_{step:08d}-a1" for step in (1, 2, 3)]


def test_a_run_without_guards_has_none(tmp_path: Path) -> None:
    assert Watch.of({"warns": [], "fails": [], "losses": [], "every": 50}) is None
    assert Watch.of({"warns": ["finite"], "fails": [], "losses": ["x"]}) == Watch(warns=("finite",), losses=("x",))
    _, recorder = trained(tmp_path, None, nan_at_four)
    assert not [event for event in recorder.events if event["kind"] == "guard"]
