"""System metrics: from readings to values, what a control group says, what a GPU says, and the sampler of a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.backends.nvml import GpuReading, open_gpus
from orchestrator.clock import ManualClock
from orchestrator.errors import ConfigError
from orchestrator.monitoring import sampler as sampler_module
from orchestrator.monitoring.cgroup import ControlGroup
from orchestrator.monitoring.host import Host, disk_bytes
from orchestrator.monitoring.sampler import LOOK, SystemSampler
from orchestrator.monitoring.samples import UNITS, Reading, energy, gpu_values, gpus_of, unit, values
from orchestrator.records import Batch, FactKind, Stream
from orchestrator.stack import StackSettings
from orchestrator.tracking.local.process import Producers
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import MEMBER, SAMPLER, WITNESS, SpoolReader, spools
from orchestrator.tracking.spool_layout import PAGE_POINTS, segment_start
from tests.plugins.recorded_gpus import RecordedGpus

# -- values


def test_a_gauge_is_recorded_as_it_is_and_a_counter_as_its_rate() -> None:
    before = Reading(at=10.0, gauges={"g": 1.0}, counters={"c": 100.0, "began_anew": 5.0})
    now = Reading(at=12.0, gauges={"g": 3.0}, counters={"c": 150.0, "began_anew": 0.0, "new": 7.0})
    assert values(now, before) == {"g": 3.0, "c": 25.0}
    assert values(now, None) == {"g": 3.0}
    assert values(before, before) == {"g": 1.0}, "no time, no rate"


def gpu(at: float, index: int = 0, **told: Any) -> GpuReading:
    return GpuReading(index=index, at=at, **told)


def test_energy_is_what_the_gpu_counted_else_power_over_time() -> None:
    assert energy(gpu(10.0, energy_joules=1500.0), gpu(0.0, energy_joules=500.0)) == 1000.0
    assert energy(gpu(10.0, power_watts=300.0), gpu(0.0, power_watts=100.0)) == 2000.0
    restarted = gpu(10.0, energy_joules=5.0, power_watts=300.0)
    assert energy(restarted, gpu(0.0, energy_joules=500.0, power_watts=100.0)) == 2000.0, "the driver was reloaded"
    assert energy(gpu(10.0), gpu(0.0)) is None
    assert energy(gpu(0.0, power_watts=1.0), gpu(0.0, power_watts=1.0)) is None


def test_a_gpu_has_the_values_that_it_tells() -> None:
    now = gpu(10.0, index=3, memory_used_bytes=25, memory_total_bytes=100, power_watts=70.0, energy_joules=900.0)
    found = gpu_values(now, 400.0)
    assert found == {
        "system/gpu_3/memory_used_bytes": 25.0, "system/gpu_3/memory_percent": 25.0, "system/gpu_3/power_watts": 70.0,
        "system/gpu_3/energy_joules": 400.0,
    }  # fmt: skip
    assert {unit(key) for key in found} == {"bytes", "%", "W", "J"}


def test_a_run_has_the_gpus_that_its_processes_use_and_all_of_them_where_that_is_unknown() -> None:
    both = [gpu(0.0, index=0, pids=frozenset({11})), gpu(0.0, index=1, pids=frozenset({12, 13}))]
    assert [each.index for each in gpus_of(both, [13, 99])] == [1]
    assert [each.index for each in gpus_of(both, [99])] == [0, 1]


# -- the machine


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_limits_a_control_group_says_nothing(tmp_path: Path) -> None:
    assert (ControlGroup(tmp_path).memory(), ControlGroup(tmp_path).cpu()) == (None, None)
    unlimited = {
        "sys/fs/cgroup/cgroup.controllers": "cpu memory", "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n", "proc/self/cgroup": "0::/\n",
    }  # fmt: skip
    group = ControlGroup(write(tmp_path, unlimited))
    assert (group.memory(), group.cpu()) == (None, None)


def test_of_nested_groups_the_tightest_limit_counts(tmp_path: Path) -> None:
    group = ControlGroup(
        write(
            tmp_path,
            {
                "proc/self/cgroup": "0::/team/run\n",
                "sys/fs/cgroup/cgroup.controllers": "cpu memory",
                "sys/fs/cgroup/team/memory.max": "1000\n",
                "sys/fs/cgroup/team/memory.current": "700\n",
                "sys/fs/cgroup/team/memory.stat": "anon 400\ninactive_file 100\n",
                "sys/fs/cgroup/team/run/memory.max": "5000\n",
                "sys/fs/cgroup/team/run/memory.current": "10\n",
                "sys/fs/cgroup/team/run/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/team/run/cpu.stat": "usage_usec 2500000\nuser_usec 1\n",
            },
        )
    )
    assert group.memory() == (600, 1000)
    assert group.cpu() == (2.5, 1.5)


def test_version_1_of_control_groups_in_a_container_that_sees_only_its_own(tmp_path: Path) -> None:
    group = ControlGroup(
        write(
            tmp_path,
            {
                "proc/self/cgroup": "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "2048\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 48\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpuacct/cpuacct.usage": "3000000000\n",
            },
        )
    )
    assert group.memory() == (2000, 4096)
    assert group.cpu() == (3.0, 2.0)


def test_a_container_has_its_own_limits_and_not_the_hosts(tmp_path: Path) -> None:
    limits = {
        "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cgroup.controllers": "cpu memory",
        "sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "250\n",
        "sys/fs/cgroup/cpu.max": "50000 100000\n", "sys/fs/cgroup/cpu.stat": "usage_usec 1000000\n",
    }  # fmt: skip
    host = Host(tmp_path, root=write(tmp_path, limits))
    before = host.read(0.0)
    write(tmp_path, {"sys/fs/cgroup/cpu.stat": "usage_usec 2000000\n"})
    found = values(host.read(4.0), before)
    assert (found["system/memory_used_bytes"], found["system/memory_percent"]) == (250.0, 25.0)
    assert found["system/cpu_percent"] == 50.0, "a second of CPU in 4 s of half a CPU"


def test_the_disk_is_found_by_its_numbers() -> None:
    text = "   8   0 sda 1 2 3 4 5 6 7 8 9 10 11\n 259   1 nvme0n1p1 10 0 100 5 20 0 50 5 0 9 9\n"
    assert disk_bytes(text, 259, 1) == (100 * 512, 50 * 512)
    assert disk_bytes(text, 0, 45) is None


def test_this_machine_tells_values_that_can_be() -> None:
    host = Host(Path.cwd())
    before, mine = host.read(0.0), host.process(os.getpid(), 0.0)
    found = values(host.read(1.0), before)
    assert mine is not None
    found |= values(host.process(os.getpid(), 1.0) or mine, mine)
    assert (
        {"system/cpu_percent", "system/memory_used_bytes", "system/process/rss_bytes"} <= found.keys() <= UNITS.keys()
    )
    assert found["system/process/rss_bytes"] > 1 << 20
    assert 0 < found["system/memory_percent"] <= 100
    assert host.process(1 << 22, 0.0) is None, "there is no such process"


# -- GPUs: a library that stands for the driver's


class NVMLError(Exception):
    pass


class Library:
    """Two GPUs; the second one is old and tells little."""

    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError
    is_open = 0

    def nvmlInit(self) -> None:
        self.is_open += 1

    def nvmlShutdown(self) -> None:
        self.is_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return SimpleNamespace(used=2 << 30, total=8 << 30)

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return SimpleNamespace(gpu=87, memory=40)

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        return 250_500

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
        if gpu == 1:
            raise NVMLError("not supported")
        return 7_000

    def nvmlDeviceGetTemperature(self, gpu: int, sensor: int) -> int:
        return 61

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: int) -> list[Any]:
        if gpu == 1:
            raise NVMLError("not supported")
        return [SimpleNamespace(pid=os.getpid())]


def test_gpus_tell_what_they_can() -> None:
    library = Library()
    gpus = open_gpus(library)
    assert gpus is not None
    new, old = gpus.read(5.0)
    assert new == GpuReading(
        index=0, at=5.0, utilization_percent=87.0, memory_used_bytes=2 << 30, memory_total_bytes=8 << 30,
        power_watts=250.5, energy_joules=7.0, temperature_celsius=61, pids=frozenset({os.getpid()}),
    )  # fmt: skip
    assert (old.index, old.energy_joules, old.pids, old.power_watts) == (1, None, frozenset(), 250.5)
    gpus.close()
    assert library.is_open == 0


def test_without_a_driver_or_a_gpu_there_is_silence(caplog: pytest.LogCaptureFixture) -> None:
    class NoDriver(Library):
        def nvmlInit(self) -> None:
            raise NVMLError("driver not loaded")

    class NoGpu(Library):
        def nvmlDeviceGetCount(self) -> int:
            return 0

    assert open_gpus(NoDriver()) is None
    empty = NoGpu()
    assert open_gpus(empty) is None
    assert empty.is_open == 0
    assert not caplog.records


def test_a_real_gpu_tells_all_of_it() -> None:
    gpus = open_gpus()
    if gpus is None:
        pytest.skip("there is no NVIDIA GPU here")
    readings = gpus.read(0.0)
    gpus.close()
    for reading in readings:
        assert reading.memory_total_bytes is not None
        assert 0 < (reading.memory_used_bytes or 0) <= reading.memory_total_bytes
        assert reading.power_watts is None or 0 < reading.power_watts < 5000
        assert reading.temperature_celsius is None or 0 < reading.temperature_celsius < 150


# -- the sampler


class Machine:
    """A spool directory with a sampler on it, and a clock that a test turns."""

    def __init__(self, root: Path, **settings: Any) -> None:
        self.root, self.clock = root, ManualClock()
        self.loggers: list[Logger] = []
        settings = {"interval": 10.0, "gpus": lambda: None, **settings}
        self.sampler = SystemSampler(root, clock=self.clock, **settings)

    def producer(self, run: str, rank: int = 0, role: str = MEMBER, attempt: int = 1) -> Logger:
        logger = Logger(self.root, run=run, attempt=attempt, rank=rank, max_bytes=1 << 20, role=role)
        self.loggers.append(logger)
        return logger

    def pass_by(self, seconds: float) -> None:
        """One look at the end of it."""
        self.clock.advance(seconds)
        self.sampler.step(self.clock.monotonic())

    def readers(self) -> list[SpoolReader]:
        """Of the sampler's spools."""
        found = [SpoolReader(path) for path in spools(self.root)]
        return sorted((r for r in found if r.owner.role == SAMPLER), key=lambda r: (r.owner.run, r.owner.rank))

    def batch(self, reader: SpoolReader) -> Batch:
        batch = reader.next_batch(Stream.points, 0)
        assert batch is not None
        return batch

    def steps(self, run: str, key: str, rank: int = 0) -> list[int]:
        found: list[int] = []
        for reader in self.readers():
            batch = self.batch(reader)
            if (reader.owner.run, reader.owner.rank) == (run, rank) and key in batch.keys:
                points = batch.points()
                found += points["step"][points["key"] == batch.keys.index(key)].tolist()
        return found

    def keys(self, run: str, rank: int = 0) -> set[str]:
        of_run = [reader for reader in self.readers() if (reader.owner.run, reader.owner.rank) == (run, rank)]
        return {key for reader in of_run for key in self.batch(reader).keys}


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    (tmp_path / "spools").mkdir()
    machine = Machine(tmp_path / "spools")
    yield machine
    for logger in machine.loggers:
        logger.close()


def test_a_run_is_sampled_a_second_after_it_appears_and_then_at_every_interval(machine: Machine) -> None:
    machine.pass_by(5.0)
    logger = machine.producer("r")
    logger.log({"loss": 1.0}, 7)
    machine.pass_by(LOOK)
    assert machine.readers() == [], "rates need a beginning"
    machine.pass_by(LOOK)
    assert machine.steps("r", "system/cpu_percent") == [7], "at the step where the run is"
    logger.log({"loss": 1.0}, 20)
    logger.log({"late": 1.0}, 3)
    machine.pass_by(9.0)
    assert machine.steps("r", "system/cpu_percent") == [7]
    machine.pass_by(1.0)
    assert machine.steps("r", "system/cpu_percent") == [7, 20], "not where its last word was about"
    machine.pass_by(10.0)
    assert machine.steps("r", "system/cpu_percent") == [7, 20, 20]
    assert machine.steps("r", "system/process/rss_bytes") == [7, 20, 20]


def test_a_later_attempt_has_no_points_before_the_step_at_which_it_went_on(machine: Machine) -> None:
    logger = machine.producer("r", attempt=2)
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    assert machine.readers() == [], "at step 0 they would replace the first attempt's"
    logger.log({"loss": 1.0}, 500)
    machine.pass_by(10.0)
    assert machine.steps("r", "system/cpu_percent") == [500]


def test_points_that_are_committed_and_removed_are_not_taken_for_damaged(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    logger = machine.producer("r")
    whole = segment_start(2) * PAGE_POINTS
    for step in range(whole + 5):
        logger.log({"loss": 1.0}, step)
    (shipped,) = (SpoolReader(path) for path in spools(machine.root))
    shipped.release(whole)
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    assert machine.steps("r", "system/cpu_percent") == [whole + 4]
    assert not caplog.records


def test_the_lowest_rank_has_the_machines_values_and_each_its_own(machine: Machine) -> None:
    for rank in (3, 2):
        machine.producer("r", rank)
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    assert machine.steps("r", "system/memory_percent", rank=2) == [0]
    assert [reader.owner.rank for reader in machine.readers()] == [2], "one process for two ranks is neither's"
    assert not [key for key in machine.keys("r", 2) if key.startswith("system/process/")]


def test_units_are_declared_once(machine: Machine) -> None:
    machine.producer("a")
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    machine.producer("b")
    machine.pass_by(10.0)
    machine.pass_by(LOOK)
    facts = [
        fact.data
        for reader in machine.readers()
        if (batch := reader.next_batch(Stream.facts, 0)) is not None
        for fact in batch.facts()
        if fact.kind is FactKind.metric
    ]
    names = [data["name"] for data in facts]
    assert len(names) == len(set(names))
    assert {"name": "system/memory_used_bytes", "unit": "bytes"} in facts
    assert machine.steps("b", "system/memory_used_bytes") == [0]


def test_a_sampler_is_no_sign_of_life_and_leaves_with_the_last_rank(machine: Machine) -> None:
    first, second = machine.producer("r", 0), machine.producer("r", 1)
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    assert [reader.is_owned() for reader in machine.readers()] == [True]
    first.close()
    machine.pass_by(10.0)
    assert len(machine.steps("r", "system/cpu_percent")) == 2, "rank 0 had the machine's values, and keeps them"
    second.close()
    assert Producers(machine.root).living() == set(), "while the sampler still has its spool"
    machine.pass_by(LOOK)
    assert [reader.is_owned() for reader in machine.readers()] == [False, False]
    machine.pass_by(20.0)
    assert len(machine.steps("r", "system/cpu_percent")) == 2


def joules(machine: Machine, run: str) -> float:
    """All that was recorded for a run."""
    found = 0.0
    for reader in machine.readers():
        batch = machine.batch(reader) if reader.owner.run == run else None
        for place, key in enumerate(batch.keys if batch else ()):
            if batch is not None and key.endswith("/energy_joules"):
                points = batch.points()
                found += float(points["value"][points["key"] == place].sum())
    return found


def test_what_gpus_use_is_divided_among_the_runs_on_them_to_the_last_joule(tmp_path: Path) -> None:
    (tmp_path / "spools").mkdir()
    gpus = RecordedGpus()
    machine = Machine(tmp_path / "spools", gpus=gpus)
    first = machine.producer("first")
    machine.pass_by(LOOK)
    machine.pass_by(4.0)
    second = machine.producer("second")
    machine.pass_by(1.0)
    machine.pass_by(3.0)
    second.close()
    machine.pass_by(1.0)
    machine.pass_by(10.0)
    first.close()
    machine.pass_by(2.0)
    # 400 W: alone for 5 s, both for 4 s, alone for 12 s.
    assert joules(machine, "second") == pytest.approx(400 * 4 / 2), "it had gone before its next sample"
    assert joules(machine, "first") == pytest.approx(400 * (5 + 2 + 12))
    machine.pass_by(60.0)
    third = machine.producer("third")
    machine.pass_by(LOOK)
    third.close()
    machine.pass_by(LOOK)
    assert joules(machine, "third") == pytest.approx(400), "shorter than the first sample; before it nobody was there"


def test_a_run_pays_for_its_own_gpu_where_the_driver_tells_whose_it_is(tmp_path: Path) -> None:
    (tmp_path / "spools").mkdir()
    gpus = RecordedGpus()
    gpus.pids = [{os.getpid()}, set()]
    machine = Machine(tmp_path / "spools", gpus=gpus)
    logger = machine.producer("r")
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    gpus.pids = [set(), set()]
    logger.close()
    machine.pass_by(3.0)
    assert joules(machine, "r") == pytest.approx(100 * 4), "its processes are gone, and yet that was its GPU"


def test_a_later_attempt_keeps_what_it_used_until_it_may_be_recorded(tmp_path: Path) -> None:
    (tmp_path / "spools").mkdir()
    machine = Machine(tmp_path / "spools", gpus=RecordedGpus())
    logger = machine.producer("r", attempt=2)
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    logger.log({"loss": 1.0}, 500)
    machine.pass_by(10.0)
    assert joules(machine, "r") == pytest.approx(400 * 11)
    logger.close()


def test_drivers_and_who_records_for_others_are_not_sampled(machine: Machine) -> None:
    machine.producer("r", rank=-1)
    machine.producer("r", role=WITNESS)
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    assert machine.readers() == []


def test_only_who_has_the_turn_samples(tmp_path: Path) -> None:
    turns = {"first": True, "second": False}
    (tmp_path / "spools").mkdir()
    first = Machine(tmp_path / "spools", is_my_turn=lambda: turns["first"])
    second = Machine(tmp_path / "spools", is_my_turn=lambda: turns["second"])
    first.producer("r")
    for machine in (first, second, first, second):
        machine.pass_by(LOOK)
    assert len(first.readers()) == 1
    turns.update(first=False, second=True)
    for machine in (first, second, first, second):
        machine.pass_by(LOOK)
    assert [reader.is_owned() for reader in first.readers()].count(True) == 1
    assert len(first.steps("r", "system/cpu_percent")) == 2
    for logger in first.loggers:
        logger.close()
    second.pass_by(LOOK)


def test_of_very_many_runs_the_newest_are_sampled_and_that_is_said_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sampler_module, "MOST_RUNS", 2)
    caplog.set_level("INFO", logger="orchestrator.monitoring")
    for age, run in enumerate(("newest", "newer", "old")):
        logger = machine.producer(run)
        os.utime(logger._spool.directory / "owner", (1e9 - age, 1e9 - age))
    for _ in range(3):
        machine.pass_by(LOOK)
    assert [reader.owner.run for reader in machine.readers()] == ["newer", "newest"]
    assert len([record for record in caplog.records if "the newest are sampled" in record.message]) == 1
    machine.loggers[0].close()
    os.utime(machine.root)  # as when the shipper removes what is committed
    for _ in range(3):
        machine.pass_by(LOOK)
    assert "old" in [reader.owner.run for reader in machine.readers()]


def test_the_energy_of_a_run_begins_with_it(tmp_path: Path) -> None:
    """A GPU that draws 250.5 W: a run that came in the middle of an interval does not get the whole of it."""

    class Metered(Library):
        clock = ManualClock()

        def nvmlDeviceGetCount(self) -> int:
            return 1

        def nvmlDeviceGetTotalEnergyConsumption(self, gpu: int) -> int:
            return round(self.clock.monotonic() * 250_500)

    (tmp_path / "spools").mkdir()
    machine = Machine(tmp_path / "spools", gpus=lambda: open_gpus(Metered()))
    Metered.clock = machine.clock
    machine.producer("a")
    machine.pass_by(LOOK)
    machine.pass_by(LOOK)
    machine.clock.advance(5.0)
    machine.producer("b")
    machine.pass_by(0.0)
    machine.pass_by(LOOK)
    joules = {}
    for reader in machine.readers():
        batch = machine.batch(reader)
        points = batch.points()
        mine = points["key"] == batch.keys.index("system/gpu_0/energy_joules")
        joules[reader.owner.run] = points["value"][mine].tolist()
    assert joules["a"] == pytest.approx([250.5, 5.5 * 250.5]), "the last second is half of it the other's"
    assert joules["b"] == pytest.approx([250.5 / 2])
    for logger in machine.loggers:
        logger.close()
    machine.pass_by(LOOK)


def test_sampling_is_a_setting_of_the_stack() -> None:
    told = StackSettings.parse(["monitoring.enabled=false", "monitoring.interval=0.5"]).monitoring
    assert (told.enabled, told.interval) == ("false", 0.5)
    for word in ("monitoring.interval=0", "monitoring.interval=often", "monitoring.interval=nan"):
        with pytest.raises(ConfigError, match="no number of seconds"):
            StackSettings.parse([word])
