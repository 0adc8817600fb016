"""What is logged is in the spool, exactly, whatever happens to the process that logged it."""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.errors import BadMetric
from orchestrator.records import Fact, FactKind, Stream
from orchestrator.tracking.logger import Logger
from orchestrator.tracking.spool import SEGMENT_POINTS, SpoolReader, SpoolUnusable, file_system_of, prepare_root, spools


@pytest.fixture
def logger(tmp_path: Path) -> Logger:
    return Logger(tmp_path / "spools", run="r1", attempt=2, rank=3)


def readers(tmp_path: Path) -> list[SpoolReader]:
    return [SpoolReader(directory) for directory in spools(tmp_path / "spools")]


def logged(reader: SpoolReader) -> list[tuple[str, int, float]]:
    found: list[tuple[str, int, float]] = []
    while (batch := reader.next_batch(Stream.points, len(found))) is not None:
        found += [(batch.keys[p["key"]], int(p["step"]), float(p["value"])) for p in batch.points()]
    return found


def test_points_come_back_as_logged(tmp_path: Path, logger: Logger) -> None:
    logger.log({"loss": 0.5, "accuracy": 1}, step=7)
    logger.log({"loss": 0.25})
    (reader,) = readers(tmp_path)
    assert logged(reader) == [("loss", 7, 0.5), ("accuracy", 7, 1.0), ("loss", 0, 0.25)]
    assert (reader.owner.run, reader.owner.attempt, reader.owner.rank) == ("r1", 2, 3)


def test_steps_count_when_none_is_given(tmp_path: Path, logger: Logger) -> None:
    for value in (0.1, 0.2, 0.3):
        logger.log({"loss": value})
    assert [step for _, step, _ in logged(readers(tmp_path)[0])] == [0, 1, 2]


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (float("nan"), float("nan")),
        (float("inf"), float("inf")),
        (float("-inf"), float("-inf")),
        (True, 1.0),
        (2**53, float(2**53)),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(-3), -3.0),
        (np.array(2.5), 2.5),
        (np.array([2.5]), 2.5),
        (np.float64("nan"), float("nan")),
    ],
)
def test_values_are_stored_exactly(tmp_path: Path, logger: Logger, value: object, stored: float) -> None:
    logger.log({"x": value})
    ((_, _, found),) = logged(readers(tmp_path)[0])
    assert found == stored or (math.isnan(found) and math.isnan(stored))


def test_a_tensor_that_holds_a_graph_and_changes_later_is_stored_as_it_was(tmp_path: Path, logger: Logger) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.tensor(2.0, requires_grad=True)
    loss = weight * 3
    logger.log({"loss": loss})
    with torch.no_grad():
        loss.add_(1)
    assert logged(readers(tmp_path)[0]) == [("loss", 0, 6.0)]


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        ({"x": 2**53 + 1}, "'x'"),
        ({"x": 10**400}, "'x'"),
        ({"x": "0.5"}, "'x'"),
        ({"x": None}, "'x'"),
        ({"x": 1j}, "'x'"),
        ({"x": [1.0]}, "'x'"),
        ({"x": np.zeros(3)}, "shape (3,)"),
        ({"": 1.0}, "empty"),
        ({3: 1.0}, "'3'"),
        ({"a\0b": 1.0}, "NUL"),
        ({"\ud800": 1.0}, "Unicode"),
        ({"k" * 1_000_000: 1.0}, "1,000,000 bytes"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name_and_the_rest_is_kept(
    tmp_path: Path, logger: Logger, metrics: dict, named: str
) -> None:
    with pytest.raises(BadMetric, match=r".") as refusal:
        logger.log({**metrics, "good": 1.0}, step=1)
    assert named in str(refusal.value)
    assert logged(readers(tmp_path)[0]) == [("good", 1, 1.0)]


@pytest.mark.parametrize("step", [1.5, "3", None.__class__, 2**63])
def test_a_step_that_is_no_whole_number_is_refused(logger: Logger, step: object) -> None:
    with pytest.raises(BadMetric, match="step"):
        logger.log({"x": 1.0}, step=step)  # type: ignore[arg-type]


def test_ten_thousand_keys_and_many_segments(tmp_path: Path, logger: Logger) -> None:
    names = [f"layer/{i}/gradient_norm" for i in range(10_000)]
    for step in range(7):
        logger.log(dict.fromkeys(names, float(step)), step=step)
    found = logged(readers(tmp_path)[0])
    assert len(found) == 70_000 > 2 * SEGMENT_POINTS
    assert found[-1] == (names[-1], 6, 6.0)


def test_committed_segments_are_removed_and_the_current_one_stays(tmp_path: Path, logger: Logger) -> None:
    for i in range(SEGMENT_POINTS * 2 + 5):
        logger.log({"x": 1.0}, step=i)
    (reader,) = readers(tmp_path)
    reader.acknowledge(Stream.points, accepted=SEGMENT_POINTS * 2 + 5, committed=SEGMENT_POINTS * 2 + 5)
    assert [p.name for p in reader.directory.glob("points-*")] == ["points-000002"]


def test_a_full_spool_blocks_until_something_is_committed(tmp_path: Path) -> None:
    small = Logger(tmp_path / "spools", run="r", attempt=1, rank=0, max_bytes=1)
    done = threading.Event()

    def fill() -> None:
        own = Logger(tmp_path / "spools", run="full", attempt=1, rank=0, max_bytes=1)
        for i in range(SEGMENT_POINTS * 3 + 1):
            own.log({"x": 1.0}, step=i)
        done.set()

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    assert not done.wait(1.0)
    (reader,) = [r for r in readers(tmp_path) if r.owner.run == "full"]
    assert reader.logged(Stream.points) == SEGMENT_POINTS * 3
    reader.acknowledge(Stream.points, SEGMENT_POINTS * 3, SEGMENT_POINTS * 3)
    assert done.wait(10)
    small.close()


def test_facts_come_back_in_order(tmp_path: Path, logger: Logger) -> None:
    for i in range(5):
        logger.fact(Fact(kind=FactKind.tag, at=float(i), data={"name": f"t{i}", "value": "ä\n"}))
    (reader,) = readers(tmp_path)
    first = reader.next_batch(Stream.facts, 0, limit=2)
    rest = reader.next_batch(Stream.facts, 2)
    assert first is not None
    assert rest is not None
    assert [f.data["name"] for f in (*first.facts(), *rest.facts())] == ["t0", "t1", "t2", "t3", "t4"]
    assert reader.next_batch(Stream.facts, 5) is None


def test_what_was_logged_survives_sigkill_and_the_lock_falls(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from orchestrator.tracking.logger import Logger\n"
        "logger = Logger(Path(sys.argv[1]), run='r', attempt=1, rank=0)\n"
        "for i in range(1000): logger.log({'x': float(i)})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "spools")], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (reader,) = readers(tmp_path)
    assert [value for _, _, value in logged(reader)] == [float(i) for i in range(1000)]
    assert not reader.is_owned()


def test_a_living_producer_owns_its_spool(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrator.tracking.logger import Logger\n"
        "logger = Logger(Path(sys.argv[1]), run='r', attempt=1, rank=0); print('up', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "spools")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    (reader,) = readers(tmp_path)
    assert reader.is_owned()
    process.communicate()
    assert not reader.is_owned()


def test_every_thread_has_a_spool_of_its_own(tmp_path: Path, logger: Logger) -> None:
    def work(start: int) -> None:
        for i in range(2000):
            logger.log({"x": 1.0}, step=start + i)

    threads = [threading.Thread(target=work, args=(10_000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    steps = sorted(step for reader in readers(tmp_path) for _, step, _ in logged(reader))
    assert steps == sorted(10_000 * n + i for n in range(4) for i in range(2000))


def _log_in_child(logger: Logger) -> None:
    for i in range(100):
        logger.log({"child": 1.0}, step=i)
    os._exit(0)


def test_a_forked_child_does_not_write_into_its_parents_spool(tmp_path: Path, logger: Logger) -> None:
    logger.log({"parent": 1.0}, step=0)
    child = multiprocessing.get_context("fork").Process(target=_log_in_child, args=(logger,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    logger.log({"parent": 2.0}, step=1)
    by_keys = sorted(tuple(sorted({key for key, _, _ in logged(reader)})) for reader in readers(tmp_path))
    assert by_keys == [("child",), ("parent",)]
    assert sorted(len(logged(reader)) for reader in readers(tmp_path)) == [2, 100]


def test_network_file_systems_are_refused(tmp_path: Path) -> None:
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path.resolve()} nfs4 rw 0 0\n"
    assert file_system_of(tmp_path / "spools", mounts) == "nfs4"
    with pytest.raises(SpoolUnusable, match="nfs4"):
        prepare_root(tmp_path / "spools", mounts)


def test_half_a_fact_on_a_full_disk_spoils_no_other(
    tmp_path: Path, logger: Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: str) -> Fact:
        return Fact(kind=FactKind.tag, at=0.0, data={"name": name, "value": "x"})

    real, calls = os.write, []

    def full(fd: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) == 1:
            return real(fd, data[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    logger.fact(said("first"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            logger.fact(said("lost"))
    assert len(calls) == 2
    logger.fact(said("last"))
    batch = readers(tmp_path)[0].next_batch(Stream.facts, 0)
    assert batch is not None
    assert [fact.data["name"] for fact in batch.facts()] == ["first", "last"]


def test_a_signal_handler_may_log_in_the_middle_of_a_log(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from orchestrator.tracking.logger import Logger\n"
        "logger, handled = Logger(Path(sys.argv[1]), run='r', attempt=1, rank=0), 0\n"
        "def handler(*_):\n"
        "    global handled; handled += 1; logger.log({'handler': 1.0}, step=handled)\n"
        "signal.signal(signal.SIGALRM, handler)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)\n"
        "for i in range(100_000): logger.log({'main': 1.0}, step=i)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0); print(handled)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "spools")], timeout=60, check=True, capture_output=True, text=True
    )
    found = logged(readers(tmp_path)[0])
    assert int(done.stdout) > 100
    assert sorted(step for key, step, _ in found if key == "handler") == list(range(1, int(done.stdout) + 1))
    assert [step for key, step, _ in found if key == "main"] == list(range(100_000))


class OnDevice:
    """A tensor on an accelerator, as far as `log` looks at it."""

    def __init__(self, value: Any) -> None:
        self.device, self._value = SimpleNamespace(type="cuda"), value

    def numel(self) -> int:
        return 1

    def detach(self) -> OnDevice:
        return self

    def reshape(self, shape: tuple[int, ...]) -> OnDevice:
        return self

    def clone(self) -> Any:
        return self._value


def test_what_a_thread_logs_from_the_device_keeps_its_key(tmp_path: Path, logger: Logger) -> None:
    torch = pytest.importorskip("torch")
    logger.log({"main": 1.0}, step=0)
    thread = threading.Thread(target=lambda: logger.log({"thread": OnDevice(torch.tensor(2.0))}, step=1))
    thread.start()
    thread.join()
    logger.flush(0.0)
    assert [point for reader in readers(tmp_path) for point in logged(reader)] == [("main", 0, 1.0), ("thread", 1, 2.0)]


def test_a_broken_device_does_not_keep_a_logger_from_closing(tmp_path: Path, logger: Logger) -> None:
    pytest.importorskip("torch")

    def assert_triggered() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    logger.log({"loss": OnDevice(SimpleNamespace(double=assert_triggered))}, step=0)
    logger.log({"loss": 1.0}, step=1)
    logger.flush(0.0)
    logger.close()
    (reader,) = readers(tmp_path)
    assert logged(reader) == [("loss", 1, 1.0)]
    assert not reader.is_owned()
