"""Our side's train functions: `orc sweep train=trials:digits`. What they time is recorded with the run itself, by the
clock of the worker, so that a trial's end and the next one's first step are comparable on one machine."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from orchestrator import Run


@dataclass
class Digits:
    lr: float = 0.005


@dataclass
class Instant:
    x: float = 0.5


def digits(run: Run, cfg: Digits) -> None:
    from subject import EPOCHS, accuracy, epoch, parts, together

    model, optimizer, loader, test = parts(cfg.lr)
    model, loader = run.prepare(model, loader)
    state = run.state(model=model, optimizer=optimizer, loader=loader)
    timed = _Timed(run)
    for _ in run.epochs(EPOCHS):
        epoch(model, optimizer, loader, timed.step)
        score = accuracy(model, test)
        together()
        began = time.perf_counter()
        run.report({"val/accuracy": score}, state=state)
        timed.reports.append(time.perf_counter() - began)
    timed.end()


def instant(run: Run, cfg: Instant) -> None:
    timed = _Timed(run)
    timed.step()
    run.report({"score": cfg.x})
    timed.end()


def brief(run: Run, cfg: Instant) -> None:
    timed = _Timed(run)
    timed.step()
    time.sleep(1.0)
    run.report({"score": cfg.x})
    timed.end()


class _Timed:
    def __init__(self, run: Run) -> None:
        self._run = run
        self._first = 0.0
        self.reports: list[float] = []

    def step(self) -> None:
        self._first = self._first or time.time()

    def end(self) -> None:
        for number, seconds in enumerate(self.reports):
            self._run.log({"bench/report": seconds}, step=number)
        self._run.log({"bench/first_step": self._first, "bench/pid": os.getpid(), "bench/end": time.time()}, step=0)
