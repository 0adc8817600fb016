"""A training that went wrong is gone on with from where all was well, and otherwise than before."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from orchestrator.backends.storage import Storage
from orchestrator.checkpoints import catalog, goodness, pointers
from orchestrator.checkpoints.engine import CheckpointEngine
from orchestrator.checkpoints.goodness import Mark
from orchestrator.checkpoints.load import load_checkpoint
from orchestrator.checkpoints.manifest import CheckpointInfo
from orchestrator.checkpoints.policy import CheckpointPolicy
from orchestrator.checkpoints.state import TrainState
from orchestrator.clock import ManualClock
from orchestrator.failures.policy import Abilities, Action, Decision, Failure, Rules, decide
from orchestrator.failures.rollback import Rollback
from orchestrator.records import Fact, FactKind, RunStatus, RunTicket
from orchestrator.training import rates
from orchestrator.training.group import Group
from orchestrator.training.guards import Diverged, GuardRules, Guards, Look, Rule
from orchestrator.training.loader import LeftOut, ShardedLoader, between, gaps_of
from orchestrator.training.run import Run
from orchestrator.training.watching import Watch

torch.set_num_threads(1)
NAN = math.nan
CPU = torch.device("cpu")


# -- batches that are left out


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ((0, 0, 16), (0, 0, 24), [(0, 0, 16, 24)]),
        ((0, 0, 0), (0, 0, 32), [(0, 0, 0, 32)]),
        ((0, 0, 0), (0, 0, 33), []),  # more than half a pass
        ((0, 0, 56), (1, 0, 8), [(0, 0, 56, 64), (1, 0, 0, 8)]),
        ((0, 1, 0), (1, 0, 8), [(1, 0, 0, 8)]),  # the epoch had one pass, which was over
        ((0, 0, 60), (0, 1, 8), [(0, 0, 60, 64), (0, 1, 0, 8)]),
        ((0, 0, 56), (2, 0, 8), []),  # a whole pass between
        ((0, 0, 64), (1, 0, 0), []),
        ((), (0, 0, 8), []),
        ((0, 0, 8), (0, 0, 8), []),
    ],
)
def test_the_batches_between_two_places(first: tuple, last: tuple, expected: list[LeftOut]) -> None:
    assert between(first, last, 64) == expected


def loaders(size: int, world: int, batch: int, left_out: list[LeftOut], **kind: Any) -> list[ShardedLoader]:
    made = []
    for rank in range(world):
        plain = DataLoader(TensorDataset(torch.arange(size)), batch, shuffle=True, **kind)
        made.append(ShardedLoader(plain, rank=rank, world_size=world, seed=1, device=CPU))
        made[-1].leave_out(left_out)
    return made


def numbers(loader: ShardedLoader) -> list[list[int]]:
    return [batch.tolist() for (batch,) in loader]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=3), st.integers(1, 3), st.integers(0, 7),
    st.booleans(),
)  # fmt: skip
def test_a_pass_gives_all_samples_but_those_left_out_and_can_be_continued_anywhere(
    ends: list[tuple[int, int]], world: int, stop: int, drops: bool
) -> None:
    size, total = 8 * 2 * world, 8 * 2 * world
    gaps: list[LeftOut] = [(0, 0, min(pair) * 2 * world, max(pair) * 2 * world) for pair in ends]
    whole = [numbers(loader) for loader in loaders(size, world, 2, [], drop_last=drops)]
    out = {at for _, _, first, last in gaps for at in range(first // (2 * world), last // (2 * world))}
    assert [each[0] for each in gaps_of(gaps, 0, 0, 0, total)] == sorted(
        {first for first, _ in gaps_of(gaps, 0, 0, 0, total)}
    )
    for rank, loader in enumerate(loaders(size, world, 2, gaps, drop_last=drops)):
        wanted = [batch for at, batch in enumerate(whole[rank]) if at not in out]
        taken, flags, places = [], [], [loader.state_dict()]
        for (batch,) in loader:
            taken.append(batch.tolist())
            flags.append(loader.is_last_batch)
            places.append(loader.state_dict())
        assert taken == wanted, "the same batches, but for those"
        assert flags == [False] * (len(wanted) - 1) + [True] * bool(wanted)
        stop = min(stop, len(wanted))
        again = loaders(size, world, 2, gaps, drop_last=drops)[rank]
        again.load_state_dict(places[stop])
        assert stop == len(wanted) or numbers(again) == wanted[stop:]
        without = loaders(size, world, 2, [], drop_last=drops)[rank]
        without.load_state_dict(places[stop])
        behind = places[stop]["used"] // (2 * world)
        assert stop in (0, len(wanted)) or numbers(without) == whole[rank][behind:], "a place means the same without"


def test_a_group_of_another_size_gets_even_shares_of_what_is_left() -> None:
    shares = [list(itertools.chain(*numbers(each))) for each in loaders(24, 3, 1, [(0, 0, 4, 8)])]
    assert len({len(share) for share in shares}) == 1
    assert len(set().union(*shares)) == 20


def test_other_passes_and_epochs_are_whole() -> None:
    (loader,) = loaders(8, 1, 2, [(1, 0, 2, 4)])
    assert [len(numbers(loader)) for _ in range(2)] == [4, 4]
    loader.set_epoch(1)
    assert [len(numbers(loader)) for _ in range(2)] == [3, 4]


# -- learning rates


def made(kind: str, lr: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    schedules: dict[str, Callable[[], Any]] = {
        "one-cycle": lambda: lr_scheduler.OneCycleLR(optimizer, max_lr=10 * lr, total_steps=20),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 20),
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        "step": lambda: lr_scheduler.StepLR(optimizer, 4),
        "cyclic": lambda: lr_scheduler.CyclicLR(optimizer, lr, 5 * lr, step_size_up=4),
        "sequential": lambda: lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)], [7]
        ),
    }
    return optimizer, schedules[kind]()


@pytest.mark.parametrize("kind", ["one-cycle", "cosine", "lambda", "step", "cyclic", "sequential"])
def test_a_schedule_that_is_lowered_in_the_middle_goes_on_as_one_that_began_so(kind: str) -> None:
    def rates_of(optimizer: Any, schedule: Any, count: int) -> list[float]:
        found = []
        for _ in range(count):
            optimizer.step()
            schedule.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    low = made(kind, 0.05)
    wanted = rates_of(*low, 12)
    optimizer, schedule = made(kind, 0.1)
    rates_of(optimizer, schedule, 5)
    assert rates.cut(0.5, {"main": optimizer}, [schedule], 7, None) == 1
    assert rates_of(optimizer, schedule, 7) == pytest.approx(wanted[5:])


# -- what follows


def failed(step: int = 12, **more: Any) -> Failure:
    return Failure(status=RunStatus.failed, kind="diverged", what="loss is nan", step=step, **more)


def following(told: Rollback | None, *history: Failure, **rules: Any) -> Decision:
    can = Abilities(actions=frozenset({Action.rollback} if told else ()), rollback=told)
    return decide(failed(), history, Rules(max_rollbacks=3, backoff=2.0, **rules), draw=0.0, can=can)


KNOWN = Rollback(to=9, good_step=10, until=12, batches=((1, 0, 16, 24),))


def test_first_the_batches_are_left_out_then_the_learning_rate_is_lowered_as_well() -> None:
    first = following(KNOWN)
    assert (first.action, first.budget) == (Action.rollback, "failures.max_rollbacks")
    assert first.changes == {"until": 12, "good_step": 10, "skip": [[1, 0, 16, 24]]}
    assert first.words == (
        "rolled back to step 9, the newest good checkpoint (all was well until step 10); 8 samples of epoch 1 are left "
        "out; after 1.0 s (restart 1 of 3: failures.max_rollbacks)"
    )
    error = {"good_step": 3, "rollback": {"to": None, "batches": [[0, 0, 24, 32]], "until": 5}}
    again = Rollback.of(error, first.changes)
    second = following(again, failed(11))
    assert second.changes == {"until": 5, "good_step": 3, "skip": [[0, 0, 24, 32], [1, 0, 16, 24]], "lr": 0.5}
    assert second.words.startswith(
        "rolled back to the beginning: there is no good checkpoint; 8 samples of epoch 0 are left out; the learning "
        "rate is multiplied by 0.5; after"
    )
    third = following(Rollback.of(error, second.changes), failed(11), failed(11))
    assert (third.changes["skip"], third.changes["lr"]) == (second.changes["skip"], 0.25)
    last = following(KNOWN, failed(1), failed(2), failed(3))
    assert last.words == "not restarted: all 3 restarts for that (failures.max_rollbacks) are used up"


@pytest.mark.parametrize(
    ("told", "rules", "expected"),
    [
        (Rollback(to=9, good_step=9, until=12), {}, {"lr": 0.5}),
        (KNOWN, {"skip": False}, {"lr": 0.5}),
        (KNOWN, {"skip": False, "lr_factor": 1.0}, {}),
        (KNOWN, {"lr_factor": 0.1}, {"skip": [[1, 0, 16, 24]]}),
    ],
)
def test_what_cannot_or_shall_not_be_left_out_lowers_the_rate_at_once(
    told: Rollback, rules: dict[str, Any], expected: dict[str, Any]
) -> None:
    changes = dict(following(told, **rules).changes)
    assert {name: changes[name] for name in changes.keys() - {"until", "good_step"}} == expected


def test_a_training_that_only_failed_is_not_gone_back_with() -> None:
    assert Rollback.of({"kind": "diverged", "good_step": 3}, {}) is None
    assert Rollback.of({"kind": "diverged", "good_step": 3}, {}, if_told=True) is None
    told = Rollback.of({"kind": "diverged", "step": 7}, {"lr": 0.5}, if_told=True)
    assert told == Rollback(is_known=False, until=7, lr=0.5)
    assert following(told).words.startswith("rolled back to the newest checkpoint; the learning rate is multiplied by")
    assert following(None).words == "not restarted: the same would only happen again"


# -- since when


def test_what_is_found_tells_since_when_nothing_is_sure() -> None:
    guards = Guards(GuardRules(), since=100)
    both = {Rule.finite, Rule.divergence, Rule.gradients}
    assert guards.vouched(both) == 100
    for step in range(101, 120):
        assert guards.reported({"loss": 1.0}, step, looks=[Look(1.0, step - 1)]) == []
    assert (guards.vouched(both), guards.vouched({Rule.finite}), guards.vouched({Rule.gradients})) == (109, 119, 118)
    nan = guards.reported({"loss": NAN}, 120)
    assert guards.good_before(nan) == 119
    (diverged,) = guards.reported({"loss": 99.0}, 121)
    assert (diverged.rule, guards.good_before([diverged])) == (Rule.divergence, 110), "before its ten values"
    norms = [Look(1000.0, step) for step in (121, 122, 123)]
    (exploded,) = guards.reported({}, 124, looks=norms)
    assert guards.good_before([exploded]) == 118


# -- checkpoints that are no good


class Diary:
    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.events: list[str] = []

    def checkpoint(self, info: CheckpointInfo) -> None:
        self.states[info.id.rpartition("/")[2]] = info.state.value

    def event(self, kind: str, message: str, *, level: str, **details: Any) -> None:
        self.events.append(f"{kind}: {message}")


class Saver:
    def __init__(self, root: Path, attempt: int = 1, **policy: Any) -> None:
        self.storage, self.diary, self.model = Storage(str(root)), Diary(), nn.Linear(2, 2)
        self.state = TrainState(model=self.model)
        self.engine = CheckpointEngine(
            self.storage, run="r1", attempt=attempt, group=Group(), policy=CheckpointPolicy(**policy),
            clock=ManualClock(50.0), diary=self.diary,
        )  # fmt: skip

    def save(self, *steps: int, vouched: int = -1, **metrics: float) -> None:
        for step in steps:
            self.engine.vouch(vouched)
            self.engine.save(
                self.state, step=step, epoch=0, epoch_complete=True, metrics=metrics, is_best=False, reasons=("now",),
                progress={}, rank_state={}, data={},
            )  # fmt: skip

    def steps(self) -> list[int]:
        return sorted(each.step for each in catalog.scan(self.storage).committed)


def test_nobody_goes_on_from_a_checkpoint_of_a_training_that_had_gone_wrong(tmp_path: Path) -> None:
    first = Saver(tmp_path, keep_last=0, best_metric="acc")
    first.save(10, acc=0.5)
    first.save(20, 30, acc=0.9)
    newest = first.engine.spoil(15, "loss diverges")
    assert newest is not None
    assert newest.step == 10
    assert first.engine.newest() is not None
    assert first.diary.states == {
        "step_00000010-a1": "committed", "step_00000020-a1": "bad", "step_00000030-a1": "bad",
    }  # fmt: skip
    assert pointers.read(first.storage, "latest") == pointers.read(first.storage, "best") == "step_00000010-a1"
    assert load_checkpoint(str(tmp_path)).step == load_checkpoint(str(tmp_path), which="best").step == 10
    assert load_checkpoint(str(tmp_path), which="step_00000030-a1").step == 30, "who names it may have it"
    first.save(40, acc=0.1)  # a writer that comes late
    assert first.steps() == [10, 20, 30, 40], "all are to be kept"

    second = Saver(tmp_path, attempt=2, keep_last=2, best_metric="acc")
    stored = second.engine.restore(second.state)
    assert stored is not None
    assert stored.manifest.step == 10
    assert second.diary.states["step_00000040-a1"] == "bad"
    assert second.diary.events == [
        "checkpoint-passed-over: 3 newer checkpoint(s) are passed over, the newest step_00000040-a1: loss diverges"
    ]
    second.save(20, acc=0.2)
    assert second.steps() == [10, 20], "no rule keeps them"
    assert [each.step for each in catalog.scan(second.storage).good] == [20, 10]


def test_a_mark_means_that_attempt_and_those_before_it() -> None:
    def info(attempt: int, step: int) -> Any:
        return type("Dated", (), {"attempt": attempt, "step": step})

    marks = (Mark(attempt=2, good_step=40, why="nan"), Mark(attempt=1, good_step=10))
    why = {(a, s): goodness.why_bad(info(a, s), marks) for a in (1, 2, 3) for s in (10, 11, 40, 41)}
    assert {each for each, words in why.items() if words} == {(1, 11), (1, 40), (1, 41), (2, 41)}
    assert (why[2, 41], why[1, 11]) == ("nan", "the training had gone wrong")


def test_a_mark_that_makes_no_sense_means_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert goodness.marks(storage) == ()
    goodness.mark(storage, Mark(attempt=1, good_step=3, why="x", at=1.0))
    storage.write_bytes("bad/attempt-2-step-3.json", b"{")
    storage.write_bytes("bad/notes.txt", b"")
    assert goodness.marks(storage) == (Mark(attempt=1, good_step=3, why="x", at=1.0),)


def test_a_checkpoint_with_nan_in_it_is_passed_over_where_that_is_asked(tmp_path: Path) -> None:
    first = Saver(tmp_path, keep_last=0)
    first.save(10)
    with torch.no_grad():
        first.model.weight[0, 0] = NAN
    first.save(20)
    second = Saver(tmp_path, attempt=2)
    stored = second.engine.restore(second.state, must_be_numbers=True)
    assert stored is not None
    assert stored.manifest.step == 10
    assert second.diary.states["step_00000020-a1"] == "bad"
    third = Saver(tmp_path, attempt=3).engine
    assert third.restore(TrainState(model=nn.Linear(2, 2))).manifest.step == 10, "from then on by everybody"  # type: ignore[union-attr]


def test_what_is_known_to_be_good_is_kept_while_newer_ones_may_turn_out_not_to_be(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep_last=1)
    most, oldest = 0, []
    for step in range(1, 40):
        saver.save(step, vouched=max(step - 10, 0))
        kept = saver.steps()
        most, oldest = max(most, len(kept)), [*oldest, step - max(s for s in kept if s <= max(step - 10, 1))]
    assert most == 3
    assert max(oldest[10:]) <= 20, "never further back than twice the time in which it is found out"


# -- a run that goes wrong and goes on


class Recorder:
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


WATCH = Watch(fails=("finite",), rolls=("finite",), every=0)


class Training:
    """Two epochs of 8 batches of 4. `spoils` makes of a batch's samples what its loss is multiplied by, and whether the
    loss that is reported shows it."""

    def __init__(self, root: Path, spoils: Callable[[list[int]], bool], *, shows: bool = True, every: int = 1) -> None:
        self._root, self._spoils, self._shows, self._every = root, spoils, shows, every
        self.attempts, self.epochs = 0, 2
        self.rates: list[float] = []
        self.events: list[Mapping[str, Any]] = []

    def __call__(self, rollback: Mapping[str, Any] | None = None, avoid: bool = False) -> list[float]:
        self.attempts += 1
        ticket = RunTicket(run="r1", name="n", experiment="e", attempt=self.attempts, directory=str(self._root))
        policy = CheckpointPolicy(every_steps=self._every, every_epochs=0, every_minutes=0, keep_last=2, at_end=False)
        recorder = Recorder()
        run = Run(ticket, recorder, seed=3, checkpoints=policy, watch=WATCH, rollback=rollback, clock=ManualClock())
        inputs = torch.randn(32, 4)
        data = TensorDataset(torch.arange(32), inputs)
        model, loader = run.prepare(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), DataLoader(data, 4, shuffle=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = lr_scheduler.StepLR(optimizer, 100)
        state = run.state(model=model, optimizer=optimizer, scheduler=schedule, loader=loader)
        self.rates.append(optimizer.param_groups[0]["lr"])
        try:
            for epoch in run.epochs(self.epochs):
                for ids, values in loader:
                    is_spoilt = epoch == 1 and self._spoils(ids.tolist())
                    if is_spoilt and avoid:
                        continue
                    loss = model(values).square().mean()
                    optimizer.zero_grad()
                    (loss * (NAN if is_spoilt else 1.0)).backward()
                    optimizer.step()
                    run.report({"loss": NAN if is_spoilt and self._shows else loss.item()}, state=state)
            return [float(each) for each in torch.cat([each.detach().flatten() for each in model.parameters()])]
        finally:
            self.events = recorder.events
            run.close()

    def fails(self, rollback: Mapping[str, Any] | None = None) -> Diverged:
        with pytest.raises(Diverged) as raised:
            self(rollback)
        return raised.value


def has_seven(ids: list[int]) -> bool:
    return 7 in ids


@pytest.fixture
def place() -> int:
    """Number of the batch of epoch 1 that has sample 7."""
    loader = ShardedLoader(
        DataLoader(TensorDataset(torch.arange(32)), 4, shuffle=True), rank=0, world_size=1, seed=3, device=CPU
    )
    loader.set_epoch(1)
    return next(number for number, batch in enumerate(numbers(loader)) if 7 in batch)


def test_a_run_goes_on_without_the_batch_and_equals_one_that_never_saw_it(tmp_path: Path, place: int) -> None:
    wanted = Training(tmp_path / "a", has_seven)(avoid=True)
    training = Training(tmp_path / "b", has_seven, every=3)
    error = training.fails()
    good = 8 + place
    assert error.failure_details == {
        "good_step": good,
        "rollback": {"to": good // 3 * 3, "batches": [[1, 0, 4 * place, 4 * place + 4]], "until": good + 1},
    }
    got = training({"skip": [[1, 0, 4 * place, 4 * place + 4]], "until": good + 1, "good_step": good})
    assert got == wanted
    assert training.rates == [0.1, 0.1]
    assert [event["message"] for event in training.events if event["kind"] == "rolled-back"] == [
        "goes on without 4 samples of epoch 1"
    ]


def test_weights_that_are_no_numbers_are_never_saved_although_the_loss_looked_well(tmp_path: Path, place: int) -> None:
    training = Training(tmp_path, has_seven, shows=False)
    error = training.fails()
    assert (error.what, error.step) == ("the weights are nan or infinite", 9 + place)
    assert error.failure_details["rollback"]["batches"] == [[1, 0, 4 * place, 4 * place + 4]]
    assert catalog.scan(Storage(str(tmp_path / "checkpoints"))).committed[0].step == 8 + place


def test_where_the_loss_came_too_late_the_gradients_of_the_next_attempt_tell_the_batch(
    tmp_path: Path, place: int
) -> None:
    wanted = Training(tmp_path / "a", has_seven)(avoid=True)
    training = Training(tmp_path / "b", has_seven, shows=False, every=7)
    late = training.fails().failure_details
    innocent = late["rollback"]["batches"]
    assert innocent == [[1, 0, 4 * place + 4, 4 * place + 8]], "whose loss was the first that showed it"
    exact = training.fails({"skip": [], "until": late["rollback"]["until"]}).failure_details
    assert exact["rollback"]["batches"] == [[1, 0, 4 * place, 4 * place + 4]]
    assert training({"skip": exact["rollback"]["batches"], "until": exact["rollback"]["until"]}) == wanted


def test_a_rate_is_lowered_once_whatever_is_resumed_later(tmp_path: Path) -> None:
    training = Training(tmp_path, lambda ids: False)
    for epochs, told in enumerate(({}, {"lr": 0.5}, {"lr": 0.5}, {}, {"lr": 0.25}), 1):
        training.epochs = epochs
        training(told)
    assert training.rates == pytest.approx([0.1, 0.05, 0.05, 0.05, 0.025])


def test_the_last_save_of_all_is_not_made_of_weights_that_are_no_numbers(tmp_path: Path) -> None:
    ticket = RunTicket(run="r1", name="n", experiment="e", attempt=1, directory=str(tmp_path))
    run = Run(ticket, Recorder(), watch=WATCH, clock=ManualClock())
    model = nn.Linear(1, 1)
    run.state(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    run.log({"loss": 1.0})
    with torch.no_grad():
        model.weight.fill_(NAN)
    with pytest.raises(Diverged, match="the weights are nan or infinite"):
        run.finish()
    assert goodness.marks(Storage(str(tmp_path / "checkpoints")))[0].good_step == 0
