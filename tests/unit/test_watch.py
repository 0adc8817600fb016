"""When a training counts as hanging, over its limits, or slowed down by one rank. The clock is turned by hand."""

from __future__ import annotations

import pytest

from orchestrator.execution.watch import AlarmKind, HangRules, Limits, RankNow, Watch, limit_error, ranks_of

HANG = HangRules(least=120, times=20, start=1800)


class Clock:
    """A run of two ranks that is looked at once a second."""

    def __init__(self, hang: HangRules = HANG, limits: Limits | None = None, spent: float = 0.0) -> None:
        self.now = 1000.0
        self.watch = Watch(hang, limits, now=self.now, spent=spent)
        self.step = 0
        self.at = 0.0
        self.values: dict[str, float] = {}
        self.others: dict[str, float] = {}
        self.alarms: list[AlarmKind] = []
        self.words: list[str] = []

    def ranks(self) -> list[RankNow]:
        told = [{key: (self.now, value) for key, value in each.items()} for each in (self.values, self.others)]
        return [RankNow(rank=rank, step=self.step, time=self.at, values=told[rank]) for rank in (0, 1)]

    def stands(self, seconds: float, *, is_known: bool = True, is_quiet: bool = False) -> list[AlarmKind]:
        """What is told while it stands still for so long."""
        before = len(self.alarms)
        for _ in range(int(seconds)):
            self.now += 1
            found = self.watch.step(self.now, self.ranks() if is_known else None, is_quiet=is_quiet)
            self.alarms += [alarm.kind for alarm in found]
            self.words += [alarm.what for alarm in found]
        return self.alarms[before:]

    def steps(self, count: int, each: float = 1) -> list[AlarmKind]:
        before = len(self.alarms)
        for _ in range(count):
            self.stands(each - 1)
            self.step += 1
            self.at = self.now + 1
            self.stands(1)
        return self.alarms[before:]


def test_steps_that_go_on_alarm_nobody_and_standing_still_does_first_as_a_warning() -> None:
    run = Clock()
    assert run.steps(300) == []
    assert run.stands(61) == [AlarmKind.stall]
    assert run.stands(58) == []
    assert not run.watch.is_hanging
    assert run.stands(3) == [AlarmKind.hang]
    assert run.stands(300) == [], "it is said once"
    assert run.words[-1] == "no progress for 121 s, longer than 120 s; until now 1 s was the longest"
    run.steps(1)
    assert not run.watch.is_hanging


def test_the_limit_is_a_multiple_of_the_longest_that_it_stood_still_before() -> None:
    run = Clock()
    run.steps(20)
    run.steps(1, each=60)
    assert run.watch.limit == pytest.approx(1200, rel=0.01)
    run.steps(1000)
    assert run.watch.limit > 900, "an evaluation of an hour ago is remembered"
    assert run.stands(600) == [AlarmKind.stall]
    run.steps(5)
    run.steps(6, each=3600)
    assert run.alarms.count(AlarmKind.hang) == 0, "its epochs take an hour, and it takes that as usual"


def test_before_the_first_step_there_is_time_for_what_comes_before_it() -> None:
    run = Clock()
    assert run.stands(899) == []
    assert run.stands(5) == [AlarmKind.stall]
    assert run.stands(900) == [AlarmKind.hang]
    assert run.words[-1].startswith("no first step for 18")
    assert Clock(HangRules(start=0)).stands(4000) == []


def test_what_an_earlier_attempt_left_is_no_progress_and_no_sample() -> None:
    run = Clock(limits=Limits(memory_gb=1))
    run.step, run.at = 500, 900.0
    left = [RankNow(rank=3, step=9, time=5.0, values={"system/process/rss_bytes": (6.0, 9e9)})]
    for _ in range(1700):
        run.now += 1
        assert [each.kind for each in run.watch.step(run.now, left)] in ([], [AlarmKind.stall])
    assert run.watch.limit == 1800, "nothing is learnt from it"


def test_nothing_counts_while_nobody_tells_or_it_has_a_reason_to_wait() -> None:
    run = Clock()
    run.steps(10)
    assert run.stands(1000, is_known=False) == run.stands(1000, is_quiet=True) == []
    assert run.stands(61) == [AlarmKind.stall]
    run.now += 5000  # the driver was frozen
    assert run.stands(50) == []
    assert run.stands(20) == [AlarmKind.hang]


def test_zero_switches_it_off_and_a_reason_to_wait_puts_it_off() -> None:
    run = Clock(HangRules(least=0))
    run.steps(5)
    assert run.stands(5000) == []
    run = Clock()
    run.steps(5)
    run.stands(130)
    run.watch.put_off(run.now, 60)
    assert not run.watch.is_hanging
    assert run.stands(59) == []
    assert run.stands(3) == [AlarmKind.hang]


def test_a_limit_warns_once_at_nine_tenths_and_ends_after_thirty_seconds() -> None:
    run = Clock(limits=Limits(memory_gb=2))
    run.values = {"system/process/rss_bytes": 1.5e9, "system/memory_used_bytes": 9e9}
    assert run.steps(5) == []
    run.others = {"system/process/rss_bytes": 1.85e9}
    assert run.steps(5) == [AlarmKind.near_limit]
    assert run.words[-1] == "rank 1: 1.85 of 2 GB of memory (resources.limits.memory_gb)"
    run.others = {"system/process/rss_bytes": 1.75e9}
    assert run.steps(5) == [], "within the hysteresis"
    run.others = {"system/process/rss_bytes": 1.85e9}
    assert run.steps(5) == []
    run.others = {"system/process/rss_bytes": 2.2e9}
    assert run.steps(29) == []
    run.others = {}
    assert run.steps(5) == [], "a peak of less than thirty seconds"
    run.others = {"system/process/rss_bytes": 2.2e9}
    assert run.steps(40) == [AlarmKind.near_limit, AlarmKind.over_limit]
    assert run.steps(100) == []


def test_one_old_sample_over_a_limit_ends_nothing() -> None:
    watch = Watch(HANG, Limits(cpu_percent=100), now=0.0)
    watch.step(0.0, [])
    stopped = [RankNow(rank=0, step=1, time=1.0, values={"system/process/cpu_percent": (1.0, 150.0)})]
    alarms = [alarm.kind for now in range(1, 100) for alarm in watch.step(float(now), stopped)]
    assert AlarmKind.over_limit not in alarms


def test_each_limit_looks_at_its_own_values() -> None:
    run = Clock(limits=Limits(gpu_memory_gb=10, cpu_percent=200))
    run.values = {"system/gpu_0/memory_used_bytes": 11e9, "system/gpu_0/memory_percent": 11e9}
    run.others = {"system/process/cpu_percent": 250.0, "system/process/rss_bytes": 1e12}
    assert sorted(run.steps(40)) == [AlarmKind.near_limit] * 2 + [AlarmKind.over_limit] * 2
    assert {word.split(" (")[1] for word in run.words} == {
        "resources.limits.gpu_memory_gb)", "resources.limits.cpu_percent)"
    }  # fmt: skip


def test_hours_are_counted_over_attempts_and_do_not_come_back() -> None:
    run = Clock(limits=Limits(hours=1), spent=3000)
    assert run.steps(230) == []
    assert run.steps(100) == [AlarmKind.near_limit]
    assert run.stands(280) == [AlarmKind.stall, AlarmKind.hang, AlarmKind.over_limit]
    assert run.words[-1] == "1 of 1 hours are used (resources.limits.hours)"
    assert run.steps(100) == []
    watch = Watch(HANG, Limits(hours=1), now=0.0, spent=3601)
    (alarm,) = watch.step(0.0, None, is_quiet=True)
    error = limit_error(alarm)
    assert (alarm.kind, error["kind"], error["rank"]) == (AlarmKind.over_limit, "time_limit", -1)
    assert error["hint"] == "resources.limits.hours is 1."


def test_a_rank_whose_steps_or_data_take_longer_is_named_once_with_the_numbers() -> None:
    run = Clock()
    run.values = {"perf/step_time": 0.10, "perf/data_wait": 0.01}
    run.others = {"perf/step_time": 0.10, "perf/data_wait": 0.02}
    assert run.steps(20) == []
    run.others = {"perf/step_time": 0.10, "perf/data_wait": 0.08}
    assert run.steps(4) == []
    assert run.steps(20) == [AlarmKind.slow_rank]
    assert run.words == ["rank 1 waits 0.08 s for each step's data, the others 0.01 s"]
    run.values = {"perf/step_time": 0.25, "perf/data_wait": 0.01}
    assert run.steps(20) == [AlarmKind.slow_rank]
    assert run.words[-1] == "rank 0 takes 0.25 s for a step, the others 0.1 s"


def test_a_value_that_does_not_change_is_one_value_and_a_single_rank_has_no_others() -> None:
    slow = {"perf/step_time": (1.0, 9.0)}
    ranks = [RankNow(rank=0, values={"perf/step_time": (1.0, 1.0)}), RankNow(rank=1, values=slow)]
    watch = Watch(HANG, now=0.0)
    watch.step(0.0, [])
    assert [alarm for now in range(1, 50) for alarm in watch.step(float(now), ranks)] == []
    run = Clock()
    run.values = {"perf/step_time": 0.1}
    assert run.steps(50) == []


def test_the_trackers_answer_is_read_rank_by_rank() -> None:
    told = {"ranks": [{"rank": 1, "step": 4, "time": 2.5, "values": {"perf/step_time": [2.0, 0.1]}}]}
    assert ranks_of(told) == [RankNow(rank=1, step=4, time=2.5, values={"perf/step_time": (2.0, 0.1)})]
    assert ranks_of({}) is None
