"""The progress of a run: plain lines for files and pipes, a live display for terminals."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

from orchestrator.cli import progress
from orchestrator.records import RunStatus, RunTicket

TICKET = RunTicket(run="r1", name="brave-otter", experiment="digits", attempt=2, directory="/runs/r1")


@dataclass(frozen=True)
class View:
    step: int
    run: str = "r1"
    epoch: int | None = 3
    metrics: dict[str, float] = field(default_factory=lambda: {"train/loss": 0.25, "val/accuracy": 0.97})
    rate: float = 1200.0
    elapsed: float = 5.0


@dataclass(frozen=True)
class Outcome:
    name: str = "brave-otter"
    status: RunStatus = RunStatus.failed
    reason: str = "rank 1: ValueError: [bad] shape"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_tell_start_phase_position_and_end() -> None:
    stream = io.StringIO()
    lines = progress.display(stream)
    lines.started(TICKET)
    lines.phase("waiting for 2 workers")
    lines.update(View(step=40))
    lines.finished(Outcome())
    assert stream.getvalue().splitlines() == [
        "run brave-otter (r1), experiment digits, attempt 2",
        "waiting for 2 workers",
        "  5.0s  epoch 3  step 40  val/accuracy=0.97  train/loss=0.25",
        "run brave-otter FAILED: rank 1: ValueError: [bad] shape",
    ]


def test_lines_come_at_most_every_two_seconds_and_only_when_something_changed() -> None:
    now = [0.0]
    stream = io.StringIO()
    lines = progress.LineDisplay(stream, monotonic=lambda: now[0])
    for second in range(7):
        now[0] = float(second)
        lines.update(View(step=min(second, 4)))
    assert [line.split("step ")[1].split()[0] for line in stream.getvalue().splitlines()] == ["0", "2", "4"]


def test_validation_metrics_come_first_when_not_all_fit() -> None:
    metrics = {f"layer/{n}": 0.0 for n in range(9)} | {"train/loss": 1.0, "val/loss": 2.0}
    assert [key for key, _ in progress.chosen_metrics(metrics, most=3)] == ["val/loss", "train/loss", "layer/0"]
    measured = {"perf/step_time": 0.1, "loss": 1.0, "system/load": 2.0}
    assert progress.chosen_metrics(measured) == [("loss", 1.0)], "what was measured is not what was said"


def test_the_live_display_draws_in_place_and_leaves_the_terminal_as_it_was() -> None:
    stream = Terminal()
    live = progress.display(stream)
    live.started(TICKET)
    live.phase("starting [2] workers")
    live.update(View(step=41))
    live.finished(Outcome())
    live.close()
    shown = stream.getvalue()
    assert "brave-otter" in shown
    assert "step 41" in shown
    assert "0.97" in shown
    assert "[bad] shape" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor comes back"
