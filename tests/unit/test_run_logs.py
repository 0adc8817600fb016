"""Structured logs: what is printed and logged stands once among the JSON lines, without secrets."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator import json_logs
from orchestrator.config import TrackingConfig
from orchestrator.errors import ConfigError
from orchestrator.execution import run_logs
from orchestrator.execution.run_logs import driver_log, rank_log, structured
from orchestrator.records import RunTicket
from orchestrator.stack import StackSettings

TICKET = RunTicket(run="r1", name="n", experiment="e", attempt=2, directory="/x")


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in structured(path).read_text().splitlines()]


def test_each_line_says_when_what_and_of_whom(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank-1.log"
    with rank_log(path, TICKET, 1, secrets=("canary-1234",)):
        print("printed", "canary-1234", end="")
        print(" further")
        logging.getLogger("mine").warning("logged %s", "canary-1234", extra={"step": 7})
        try:
            raise ValueError("bad canary-1234")
        except ValueError:
            logging.getLogger("mine").exception("it failed")
        print("unfinished", end="")
    printed, logged, failed, last = entries(path)
    assert (printed["message"], printed["stream"]) == ("printed *** further", "stdout")
    assert (logged["message"], logged["level"], logged["logger"], logged["step"]) == (
        "logged ***",
        "WARNING",
        "mine",
        7,
    )
    assert failed["traceback"].splitlines()[-1] == "ValueError: bad ***"
    assert last["message"] == "unfinished"
    for entry in (printed, logged, failed, last):
        assert (entry["run"], entry["attempt"], entry["rank"]) == ("r1", 2, 1)
        assert entry["time"] > 1.7e9
        assert entry["pid"]
        assert entry["host"]
    assert "canary" not in path.read_text() + structured(path).read_text()


def test_a_progress_bar_is_one_line_and_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.log"
    with rank_log(path, TICKET, 0):
        for n in range(5000):
            print(f"\r{n} of 5000", end="")
        print()
    assert [entry["message"] for entry in entries(path)] == ["4999 of 5000"]


def test_lines_of_threads_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.log"

    def talk(name: str) -> None:
        for _ in range(200):
            print(name, name)  # two writes and a newline

    with rank_log(path, TICKET, 0):
        threads = [threading.Thread(target=talk, args=(f"t{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counted = [entry["message"] for entry in entries(path)]
    assert sorted(counted) == sorted(f"t{n} t{n}" for n in range(4) for _ in range(200))


def test_a_forked_process_does_not_repeat_its_parent(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.log"
    with rank_log(path, TICKET, 0):
        print("the parent's ", end="")
        child = multiprocessing.get_context("fork").Process(target=print, args=("the child's",))
        child.start()
        child.join()
        print("own")
    found = entries(path)
    assert {entry["message"] for entry in found} == {"the child's", "the parent's own"}
    assert len({entry["pid"] for entry in found}) == 2


def test_only_the_named_component_speaks_in_detail(tmp_path: Path) -> None:
    ours, other = logging.getLogger("orchestrator.execution.driver"), logging.getLogger("somebody")
    for components, wanted in ((("driver",), ["detail", "news"]), (("worker",), ["news"])):
        path = tmp_path / components[0] / "driver.log"
        with driver_log(path, TICKET, components=components):
            ours.debug("detail")
            ours.info("news")
            other.debug("theirs")
        assert [entry["message"] for entry in entries(path)] == wanted


def test_an_unknown_component_is_refused_naming_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean worker"):
        TrackingConfig(debug=["workr"])
    with pytest.raises(ConfigError, match="Did you mean mirror"):
        StackSettings.parse(["tracking.debug=tracker,miror"])
    assert StackSettings.parse(["tracking.debug=tracker, mirror"]).tracking.debug == "tracker,mirror"


def test_a_full_disk_does_not_break_a_print(capsys: pytest.CaptureFixture[str]) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        printed = run_logs._Printed(run_logs._Unbreakable(full), json_logs.Lines({}), "stdout")
        printed.take("a line\n" * 10_000)


def test_a_line_reads_as_text() -> None:
    line = json_logs.Lines({}).line(at=0.25, level="INFO", logger="a.b", message="m", more={"traceback": "T"})
    first, second = json_logs.as_text(line).splitlines()
    assert first.endswith(",250 INFO a.b m")
    assert second == "T"
    assert json_logs.as_text("no JSON") == "no JSON"


def test_what_utf8_has_no_bytes_for_is_kept_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's name that is no text, as Python gives it."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    path = tmp_path / "rank-0.log"
    with rank_log(path, TICKET, 0):
        print("caf\u00e9")
        logging.getLogger("mine").warning("read %s", "\udcff.txt")
    assert [entry["message"] for entry in entries(path)] == ["caf\u00e9", "read \udcff.txt"]
    assert "\\udcff.txt" in path.read_text(encoding="utf-8")
