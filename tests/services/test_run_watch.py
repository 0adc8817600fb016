"""`orc watch` of a run that is logged in local mode: with Redis, without it, when it stands still, through the API."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.text import Text

from orchestrator.cli.main import main
from orchestrator.records import Fact, FactKind, RunSpec, RunTicket
from orchestrator.tracking.local.places import places
from orchestrator.tracking.logger import Logger
from tests.plugins.api_server import serving
from tests.plugins.local_stack import LocalStack
from tests.plugins.own_redis import OwnRedis, own_redis
from tests.plugins.runs import wait_until


@pytest.fixture(scope="module")
def redis() -> Iterator[OwnRedis]:
    with own_redis() as server:
        yield server


@pytest.fixture(scope="module")
def local(schema_url: str, redis: OwnRedis) -> Iterator[LocalStack]:
    stack = LocalStack.make(schema_url)
    replace(stack.stack, redis_url=redis.url).save()
    yield stack
    stack.remove()


@dataclass
class Watching:
    """A run with one rank, and `orc watch --json` of it."""

    local: LocalStack
    ticket: RunTicket
    logger: Logger
    process: subprocess.Popen[str]

    def log(self, step: int, **values: float) -> None:
        self.logger.log(values, step=step)

    def line(self, **wanted: Any) -> dict[str, Any]:
        """The first line from now on that has these values (newest ones of metrics, else fields)."""
        assert self.process.stdout is not None
        seen = []
        while text := self.process.stdout.readline():
            line = json.loads(text)
            seen.append(line)
            told = {key: value["value"] for key, value in line["metrics"].items()}
            if all(told.get(key, line.get(key)) == value for key, value in wanted.items()):
                return line
        raise AssertionError(f"{wanted} did not come: {seen[-3:]}")

    def end(self, status: str) -> int:
        end = Fact(kind=FactKind.status, at=time.time(), data={"status": status, "reason": "said so"})
        self.logger.fact(end)
        return self.process.wait(30)


@contextmanager
def watching(local: LocalStack, *words: str, **spec: Any) -> Iterator[Watching]:
    tracker = local.tracker()
    ticket = tracker.open_run(RunSpec(experiment="e", storage_url=str(local.home / "runs"), lease=600, **spec))
    logger = Logger(places(local.stack).spools, run=ticket.run, attempt=ticket.attempt, rank=0)
    process = local.start("-m", "orchestrator.cli.main", "watch", ticket.run, "--json", *words, cwd=local.home)
    try:
        yield Watching(local, ticket, logger, process)
    finally:
        logger.close()
        process.kill()
        process.communicate()


def test_a_run_is_followed_from_before_its_first_value_to_its_end(local: LocalStack) -> None:
    with watching(local, params={"steps": 4, "epochs": 2}) as run:
        first = run.line(status="RUNNING")
        assert (first["metrics"], first["step"]) == ({}, 0)
        run.log(1, loss=0.5)
        line = run.line(loss=0.5)
        assert (line["source"], line["steps"], line["epochs"], line["attempt"]) == ("redis", 4, 2, 1)
        assert line["metrics"]["loss"]["step"] == 1
        run.log(2, loss=float("nan"), epoch=1)
        assert run.line(loss="nan")["epoch"] == 1
        assert run.end("FINISHED") == 0
        assert run.process.stdout is not None
        last = json.loads(run.process.stdout.read().splitlines()[-1])
        assert (last["status"], last["reason"]) == ("FINISHED", "said so")


def test_a_redis_that_stands_still_or_is_dead_is_replaced_by_the_record(local: LocalStack, redis: OwnRedis) -> None:
    with watching(local) as run:
        run.log(1, loss=1.0)
        assert run.line(loss=1.0)["source"] == "redis"
        redis.freeze()
        try:
            run.log(2, loss=2.0)
            run.line(loss=2.0)
        finally:
            redis.thaw()
        redis.kill()
        run.log(3, loss=3.0)
        run.line(loss=3.0)
        redis.start()
        wait_until(lambda: run.log(4, loss=4.0) or run.line(loss=4.0)["source"] == "redis", 30, "Redis is used again")
        assert run.end("FINISHED") == 0


def test_without_redis_the_database_is_asked(local: LocalStack, tmp_path: Path) -> None:
    replace(local.stack, home=str(tmp_path), redis_url="").save()
    with watching(local, "--home", str(tmp_path)) as run:
        run.log(1, loss=1.0)
        assert run.line(loss=1.0)["source"] == "database"
        run.log(2, loss=2.0)
        run.line(loss=2.0)
        assert run.end("FAILED") == 1  # how the run ended


def test_through_the_api_it_is_the_same(local: LocalStack, tmp_path: Path) -> None:
    with serving(local.stack) as served:
        words = ("--api", served.api_url)
        token = {"ORC_API_TOKEN": Path(served.api_token_path).read_text()}
        tracker = local.tracker()
        ticket = tracker.open_run(RunSpec(experiment="e", lease=600))
        logger = Logger(places(local.stack).spools, run=ticket.run, attempt=1, rank=0)
        command = ("-m", "orchestrator.cli.main", "watch", ticket.run, "--json", *words)
        process = local.start(*command, cwd=tmp_path, ORC_HOME=str(tmp_path / "none"), **token)
        run = Watching(local, ticket, logger, process)
        try:
            run.log(1, loss=1.0)
            assert run.line(loss=1.0)["source"] == "redis"
            run.log(2, loss=2.0)
            run.line(loss=2.0)
            assert run.end("FINISHED") == 0
        finally:
            logger.close()
            process.kill()
            process.communicate()


def test_on_a_terminal_it_is_drawn_in_place_and_ctrl_c_gives_it_back(local: LocalStack) -> None:
    ticket = local.tracker().open_run(RunSpec(experiment="e", name="brave-otter", lease=600))
    logger = Logger(places(local.stack).spools, run=ticket.run, attempt=1, rank=0)
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where the tests run in the background of a shell
        words = ["-m", "orchestrator.cli.main", "--home", str(local.home), "watch", ticket.run, "--interval", "0"]
        os.execve(sys.executable, [sys.executable, *words], {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"})
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        before, seen = termios.tcgetattr(terminal), b""
        step = 0
        while b"drop/me" not in seen or seen.count(b"brave-otter") < 3:
            step += 1
            logger.log({"drop/me" + "x" * 200: 0.5, "k": float(step)}, step=step)
            seen += os.read(terminal, 65536)
        os.write(terminal, b"\x03")
        with contextlib.suppress(OSError):  # the other end is closed
            while more := os.read(terminal, 65536):
                seen += more
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
        child = 0
        assert termios.tcgetattr(terminal) == before
        drawn, said = seen.rsplit(b"\x1b[?25h", 1)  # the cursor is shown again
        assert drawn.count(b"\x1b[?25l") == 1
        assert said.strip() == b"orc: interrupted"
        assert b"Traceback" not in seen
        frames = drawn.decode().split("brave-otter")[1:]
        assert all(cell_len(Text.from_ansi(line).plain) < 80 for frame in frames for line in frame.splitlines())
        up = [int(lines) for lines in re.findall(rb"\r\x1b\[(\d+)A", drawn)]
        assert up[0] == frames[0].count("\n")  # from below the frame to its first line
    finally:
        logger.close()
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(terminal)
    assert str(local.store.run(ticket.run).status) == "RUNNING"


def test_chosen_keys_and_ranks_and_one_look(local: LocalStack, capsys: pytest.CaptureFixture[str]) -> None:
    with watching(local, "--keys", "val/*", "--rank", "all") as run:
        other = Logger(places(local.stack).spools, run=run.ticket.run, attempt=1, rank=1)
        run.logger.log({"val/acc": 0.5, "loss": 9.0}, step=1)
        other.log({"val/acc": 0.25}, step=1)
        other.close()
        seen: dict[str, Any] = {}
        while seen.keys() != {"val/acc", "val/acc/rank_1"}:
            assert run.process.stdout is not None
            seen |= json.loads(run.process.stdout.readline())["metrics"]
        wait_until(lambda: local.points(run.ticket.run, "loss"), 30, "it is committed")
        look = ("--home", str(local.home), "watch", run.ticket.run, "--once")
        assert main(look) == 0
        said = capsys.readouterr().out
        assert "val/acc" in said
        assert "loss" in said
        assert main([*look, "--json", "--no-redis"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["metrics"]["loss"]["value"], document["source"]) == (9.0, "database")
        assert main(["--home", str(local.home), "watch", "nobody"]) == 2
        assert "There is no run 'nobody'" in capsys.readouterr().err
