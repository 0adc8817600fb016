"""What a judge says to a sequence of reports, and what it has counted."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from orchestrator.training import judging
from orchestrator.training.judging import Action, Judge, Report, Tally

NAN = math.nan
LOSS = [["val/loss", "min"]]


def new_judge(**spec: Any) -> Judge:
    made = judging.judge(spec)
    assert made is not None
    return made


def report(metrics: Mapping[str, float], *, epochs: int = 0, step: int = 0, uses_epochs: bool = False) -> Report:
    return Report(metrics, step, epochs, uses_epochs, True)


def told(judge: Judge, losses: Sequence[float], *, first: int = 1) -> list[Action]:
    """One report per epoch, the first one at the end of epoch `first`."""
    return [
        judge.reported(report({"val/loss": loss}, epochs=epoch, step=10 * epoch, uses_epochs=True)).action
        for epoch, loss in enumerate(losses, first)
    ]


def as_json(tally: Tally) -> Any:
    return json.loads(json.dumps(tally.to_json(), allow_nan=False))


def test_nothing_to_judge_is_no_judge() -> None:
    assert judging.judge({}) is None
    assert judging.judge({"stopping": {"metric": "val/loss", "patience": 0, "target": None}}) is None
    assert judging.judge({"stopping": {"patience": 3}}) is not None
    assert judging.judge({"until": None, "unit": "auto", "objectives": []}) is not None


def test_a_milestone_pauses_at_its_first_report() -> None:
    judge = new_judge(until=3.0, unit="auto", objectives=LOSS)
    assert told(judge, [3, 2, 1]) == ["go", "go", "pause"]
    tally = as_json(judge.tally())
    assert (tally["unit"], tally["resource"], tally["verdict"], tally["reason"]) == ("epoch", 3.0, "pause", "")
    assert tally["reports"] == [[1.0, 3], [2.0, 2], [3.0, 1]]
    assert (tally["last"], tally["best"], tally["n_reports"]) == ({"val/loss": 1.0}, {"val/loss": 1.0}, 3)


def test_a_report_without_the_objective_neither_pauses_nor_counts() -> None:
    judge = new_judge(until=2.0, unit="auto", objectives=LOSS)
    verdicts = []
    for epoch in (1, 2):
        verdicts.append(judge.reported(report({"train/loss": 9.0}, epochs=epoch, uses_epochs=True)).action)
        verdicts.append(judge.reported(report({"val/loss": 1.0}, epochs=epoch, uses_epochs=True)).action)
    assert verdicts == ["go", "go", "go", "pause"]
    # Evaluated every third epoch: later than the milestone, and it says so.
    rare = new_judge(until=2.0, unit="epoch", objectives=LOSS)
    assert rare.reported(report({"train/loss": 1.0}, epochs=2)).action is Action.go
    assert rare.reported(report({"val/loss": 1.0}, epochs=3)).action is Action.pause
    assert rare.tally().resource == 3.0


@pytest.mark.parametrize(
    ("unit", "uses_epochs", "found", "at"),
    [
        ("auto", True, "epoch", 4),
        ("auto", False, "report", 2),
        ("step", True, "step", 2),
        ("report", True, "report", 2),
    ],
)
def test_the_resource_has_the_unit_that_was_said_or_found_out(
    unit: str, uses_epochs: bool, found: str, at: int
) -> None:
    """Two reports per epoch, ten steps apart."""
    judge = new_judge(until={"step": 20.0}.get(found, 2.0), unit=unit, objectives=LOSS)
    verdicts = [
        judge.reported(report({"val/loss": 1.0}, epochs=n // 2, step=10 * n, uses_epochs=uses_epochs)).action
        for n in range(1, 5)
    ]
    assert verdicts.index(Action.pause) + 1 == at
    assert judge.tally().unit == found


@pytest.mark.parametrize(
    ("metrics", "declared", "expected"),
    [
        ({"train/loss": 1.0, "val/accuracy": 0.5}, {}, ("val/accuracy", "max")),
        ({"train/loss": 1.0, "val/loss": 0.5}, {}, ("val/loss", "min")),
        ({"val/accuracy": 0.5, "val/perplexity": 3.0}, {"val/perplexity": "min"}, ("val/perplexity", "min")),
        ({"val/Error_rate": 0.5}, {}, ("val/Error_rate", "min")),
        ({"score": 0.5, "perf/step": 1.0}, {}, ("score", "max")),
        ({"val/loss": 0.5}, {"val/loss": "max"}, ("val/loss", "max")),
    ],
)
def test_an_objective_that_nobody_named_is_found_in_the_first_report(
    metrics: dict[str, float], declared: dict[str, str], expected: tuple[str, str]
) -> None:
    judge = new_judge(until=None, objectives=[])
    for name, direction in declared.items():
        judge.declared(name, direction)
    judge.reported(report(metrics))
    judge.reported(report({"aaa": 1.0, **metrics}))
    assert judge.tally().objectives == (expected,)
    assert judge.tally().n_reports == 2


def test_the_metric_of_the_checkpoints_is_the_objective_where_none_is_named() -> None:
    judge = judging.judge({"objectives": []}, best_metric=("acc", "max"))
    assert judge is not None
    assert judge.missing() == ["acc"]
    judge.reported(report({"val/loss": 1.0, "acc": 0.5}))
    assert judge.tally().objectives == (("acc", "max"),)
    assert judge.missing() == []


def test_the_best_is_finite_and_the_last_is_the_last() -> None:
    judge = new_judge(objectives=[["val/loss", "min"], ["acc", "max"]])
    for loss, accuracy in ((2.0, 0.1), (-math.inf, math.inf), (1.0, 0.3), (NAN, 0.2)):
        judge.reported(report({"val/loss": loss, "acc": accuracy}))
    tally = as_json(judge.tally())
    assert tally["best"] == {"val/loss": 1.0, "acc": 0.3}
    assert tally["last"] == {"val/loss": "nan", "acc": 0.2}
    assert tally["reports"] == [[1.0, 2.0], [2.0, "-inf"], [3.0, 1.0], [4.0, "nan"]]


def median(means: Sequence[Sequence[float]], *, grace: int = 1, every: int = 1) -> dict[str, Any]:
    return {"at": 5, "direction": "min", "grace": grace, "trials": 3, "every": every, "means": means}


def test_who_falls_behind_the_median_ends_and_says_what_it_was_compared_with() -> None:
    judge = new_judge(until=4.0, objectives=LOSS, median=median([[1, 5.0, 2], [2, 3.0, 3]]))
    assert told(judge, [9.0, 4.0]) == ["go", "end"]
    tally = as_json(judge.tally())
    assert tally["verdict"] == "end"
    assert tally["reason"] == "behind the median: its best val/loss was 4 after 2 epochs, the median of 3 others 3"
    assert tally["compared"] == {"resource": 2.0, "best": 4.0, "median": 3.0, "n": 3, "is_behind": True}


def test_an_end_goes_before_a_pause() -> None:
    judge = new_judge(until=2.0, objectives=LOSS, stopping={"target": 0.5})
    assert told(judge, [1.0, 0.4]) == ["go", "end"]
    assert judge.tally().reason == "val/loss reached 0.4, the target is 0.5"


def test_early_stopping_may_watch_another_metric_than_the_objective() -> None:
    spec = {"metric": "train/loss", "direction": "min", "patience": 2}
    judge = new_judge(objectives=[["val/accuracy", "max"]], stopping=spec)
    verdicts = [
        judge.reported(report({"train/loss": 1.0, "val/accuracy": float(n)})).action for n in range(4)
    ]  # fmt: skip
    assert verdicts[:3] == ["go", "go", "end"]
    first = new_judge(stopping={"patience": 1})
    assert [first.reported(report({"val/accuracy": value})).action for value in (0.1, 0.2, 0.2)] == ["go", "go", "end"]


def test_restored_after_any_report_it_says_and_counts_the_same() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        losses = [draw.choice([draw.uniform(0, 10), draw.uniform(0, 10), NAN, math.inf]) for _ in range(12)]
        spec = {
            "until": 9.0, "unit": "auto", "objectives": LOSS if seed % 2 else [],
            "median": median([[at, draw.uniform(0, 9), at] for at in range(1, 9)], grace=2, every=2),
            "stopping": {"patience": draw.randint(2, 6), "plateau": 3, "plateau_std": 0.5},
        }  # fmt: skip
        whole = new_judge(**spec)
        verdicts = told(whole, losses)
        ends = next((n for n, verdict in enumerate(verdicts) if verdict != "go"), 12)
        for cut in range(1, ends + 1):
            first, second, straight = new_judge(**spec), new_judge(**spec), new_judge(**spec)
            told(first, losses[:cut])
            stands = second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
            assert stands.action is Action.go
            assert told(second, losses[cut : ends + 1], first=cut + 1) == verdicts[cut : ends + 1]
            told(straight, losses[: ends + 1])
            assert as_json(second.tally()) == as_json(straight.tally())


def test_who_had_reached_the_milestone_or_the_end_is_still_there() -> None:
    paused = new_judge(until=2.0, objectives=LOSS)
    told(paused, [2, 1])
    assert new_judge(until=2.0, objectives=LOSS).restore(paused.state()).action is Action.pause
    further = new_judge(until=4.0, objectives=LOSS)
    assert further.restore(paused.state()).action is Action.go
    assert told(further, [0.9, 0.8], first=3) == ["go", "pause"]
    assert len(further.tally().reports) == 4

    ended = new_judge(objectives=LOSS, stopping={"patience": 1})
    told(ended, [1, 1])
    again = new_judge(objectives=LOSS, stopping={"patience": 1})
    verdict = again.restore(ended.state())
    assert (verdict.action, verdict.reason) == (Action.end, ended.tally().reason)
    assert as_json(again.tally()) == as_json(ended.tally())
    assert new_judge(objectives=LOSS, stopping={"patience": 5}).restore(ended.state()).action is Action.go


def test_a_clone_has_its_donors_resource_and_none_of_its_merits() -> None:
    donor = new_judge(until=2.0, objectives=LOSS, stopping={"patience": 3})
    told(donor, [0.1, 0.2])
    clone = new_judge(until=4.0, objectives=LOSS, stopping={"patience": 3})
    assert clone.restore(donor.state(), is_clone=True).action is Action.go
    assert told(clone, [0.9, 0.8], first=3) == ["go", "pause"]
    tally = as_json(clone.tally())
    assert (tally["best"], tally["reports"]) == ({"val/loss": 0.8}, [[3.0, 0.9], [4.0, 0.8]])


def test_of_many_reports_evenly_spaced_ones_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "MOST_REPORTS", 20)
    first, second = new_judge(objectives=LOSS), new_judge(objectives=LOSS)
    for n in range(1, 60):
        first.reported(report({"val/loss": float(n)}))
    second.restore(json.loads(json.dumps(first.state())))
    for judge in (first, second):
        for n in range(60, 100):
            judge.reported(report({"val/loss": float(n)}))
    assert [at for at, _ in first.tally().reports] == [float(n) for n in range(8, 100, 8)]
    assert first.tally() == second.tally()
    assert first.tally().n_reports == 99
