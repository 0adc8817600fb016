"""A pytest plugin that gives all tests on Ray one lane, and says how long each tier took beside what it may take.

A tier is a folder of tests/. Loaded by `make test` with `-p tests.plugins.tiers`. A tier that took longer is reported,
not failed: how fast the machine is decides that too.

`make test` has two worker processes (pytest-xdist). Tests on Ray mostly wait for processes to start, so one of the
workers goes through them, one after another, while the other takes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

CAPS = {"unit": 30, "services": 300, "ray": 600, "chaos": 300, "journeys": 300}
"""Seconds on two cores."""

ON_RAY = (
    "tests/ray/",
    "tests/journeys/",
    "tests/chaos/test_checkpoint_nodes.py",
    "tests/chaos/test_lost_processes.py",
    "tests/chaos/test_nemesis.py",
    "tests/chaos/test_sweep_kills.py",
    "tests/chaos/test_unshared_storage.py",
)
"""Which tests need a cluster; one of them runs at a time."""


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
    """Adds up how long the tests took, fixtures where they are used."""

    def __init__(self) -> None:
        self.tiers: dict[str, Tier] = {}

    def count(self, report: pytest.TestReport) -> None:
        tier = self.tiers.setdefault(tier_of(report.nodeid), Tier())
        tier.seconds += report.duration
        tier.tests += report.when == "setup"
        if report.when == "call" or report.outcome != "passed":
            tier.outcomes[report.outcome] = tier.outcomes.get(report.outcome, 0) + 1

    def lines(self) -> list[str]:
        return [_line(name, tier) for name, tier in sorted(self.tiers.items(), key=_in_order)]


def _in_order(named: tuple[str, Tier]) -> int:
    return [*CAPS, named[0]].index(named[0])


def _line(name: str, tier: Tier) -> str:
    cap = CAPS.get(name)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tier.outcomes.items()))
    limit = f"of {cap:4d} s" if cap else ""
    late = "   TOO SLOW for two cores" if cap and tier.seconds > cap else ""
    return f"{name:10} {tier.seconds:7.1f} s {limit:9} {tier.tests:5d} tests: {outcomes}{late}"


def is_on_ray(nodeid: str) -> bool:
    return nodeid.startswith(ON_RAY)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not is_on_ray(item.nodeid))  # the long lane starts at once


class Lanes(LoadScopeScheduling):
    """The tests on Ray are one piece of work, of the others each file is one."""

    def _split_scope(self, nodeid: str) -> str:
        return "on Ray" if is_on_ray(nodeid) else nodeid.partition("::")[0]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Lanes:
    return Lanes(config, log)


class Teller:
    """Says at once which test failed, not half an hour later; and at the end how long all took."""

    def __init__(self, config: pytest.Config) -> None:
        self._config, self._clock = config, TierClock()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._clock.count(report)
        reporter = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and reporter is not None:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(getattr(crash, "message", "")).partition("\n")[0][:200]
            reporter.write_line(f"\nFAILED {report.nodeid} ({report.when}) {why}")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if lines := self._clock.lines():
            terminalreporter.section("time of the tiers")
            for line in lines:
                terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # a worker's reports come to the one process that prints
        config.pluginmanager.register(Teller(config))
