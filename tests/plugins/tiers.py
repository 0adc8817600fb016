"""A pytest plugin that says how long each tier of tests took, beside the time it may take on two cores.

A tier is a folder of tests/. Loaded by `make test` with `-p tests.plugins.tiers`. A tier that took longer is reported,
not failed: how fast the machine is decides that too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import pytest

CAPS = {"unit": 30, "services": 300, "ray": 600, "chaos": 300, "journeys": 300}
"""Seconds of wall-clock on two cores."""


@dataclass
class Tier:
    """What happened in one folder of tests/."""

    tests: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int] = field(default_factory=dict)


def tier_of(nodeid: str) -> str:
    """The folder below tests/ of a test: `tests/ray/test_up.py::test_it` is in tier `ray`."""
    parts = nodeid.split("::")[0].split("/")
    return parts[1] if len(parts) > 2 and parts[0] == "tests" else "other"


class TierClock:
    """Adds up the time from the start of each test to the start of the next: fixtures count where they are used."""

    def __init__(self) -> None:
        self.tiers: dict[str, Tier] = {}
        self._current: Tier | None = None
        self._since = 0.0

    def begin(self, nodeid: str, now: float) -> None:
        self.pause(now)
        self._current = self.tiers.setdefault(tier_of(nodeid), Tier())
        self._current.tests += 1

    def pause(self, now: float) -> None:
        if self._current is not None:
            self._current.seconds += now - self._since
        self._current, self._since = None, now

    def count(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcomes = self.tiers.setdefault(tier_of(report.nodeid), Tier()).outcomes
            outcomes[report.outcome] = outcomes.get(report.outcome, 0) + 1

    def lines(self) -> list[str]:
        return [_line(name, tier) for name, tier in self.tiers.items()]


def _line(name: str, tier: Tier) -> str:
    cap = CAPS.get(name)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tier.outcomes.items()))
    limit = f"of {cap:4d} s" if cap else ""
    late = "   TOO SLOW for two cores" if cap and tier.seconds > cap else ""
    return f"{name:10} {tier.seconds:7.1f} s {limit:9} {tier.tests:5d} tests: {outcomes}{late}"


_clock = TierClock()


def pytest_runtest_logstart(nodeid: str) -> None:
    _clock.begin(nodeid, time.monotonic())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _clock.count(report)


def pytest_sessionfinish() -> None:
    _clock.pause(time.monotonic())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _clock.tiers:
        terminalreporter.section("wall-clock of the tiers")
        for line in _clock.lines():
            terminalreporter.write_line(line)
