"""`orc keep` on a stack without Ray: what it begins again, what it leaves alone, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from orchestrator.status import RunStatus
from orchestrator.store.store import Store
from tests.plugins.local_stack import LocalStack
from tests.plugins.runs import PROJECT, wait_until

ORC = ("-m", "orchestrator.cli.main")
KEEP = (*ORC, "keep", "--local", "--json")
KEPT = (
    *("run", "--local", "run.keep=true", "tracking.heartbeat=0.5", "tracking.lease=3", "resources.workers=1"),
    *("provenance.source=false", "tracking.perf=false"),
)


def heard(keeper: subprocess.Popen[str]) -> dict[str, Any]:
    """The next thing that it says."""
    assert keeper.stdout is not None
    return json.loads(keeper.stdout.readline())


def lost(local: LocalStack, *words: str) -> str:
    """A run whose driver was killed while it trained, once that is known."""
    known = {row.run for row in local.store.runs(limit=1000)}
    driver = local.start(*ORC, *KEPT, *words, cwd=PROJECT)
    run = wait_until(lambda: [r.run for r in local.store.runs(limit=9) if r.run not in known], 60, "a new run")[0]
    wait_until(lambda: local.points(run, "loss"), 60, "it trains")
    driver.kill()
    driver.communicate()
    assert driver.returncode == -signal.SIGKILL
    wait_until(lambda: status(local, run) is RunStatus.crashed, 60, "the lost driver is noticed")
    return run


def status(local: LocalStack, run: str) -> RunStatus:
    return local.store.run(run).status


def attempts(local: LocalStack, run: str) -> Sequence[int]:
    return [attempt.attempt for attempt in local.store.attempts(run)]


def test_a_lost_run_is_begun_again_once_and_one_with_a_bug_is_not(local: LocalStack, tmp_path: Path) -> None:
    (tmp_path / "buggy.py").write_text("def train(run, cfg):\n    raise TypeError('a bug')\n")
    local.run(*ORC, *KEPT, "train=buggy:train", cwd=tmp_path, code=1)
    failed = local.store.runs(limit=1)[0].run
    keeper = local.start(*KEEP, "--interval=0.5", cwd=tmp_path)
    try:
        with closing(Store(local.stack.database_url)) as other:
            assert other.try_keep()
            assert "another `orc keep` on this database" in heard(keeper)["message"]
            assert heard(keeper)["message"] == "the stack is up"
            run = lost(local, "train=searched:train", "epochs=100", "pause=0.05")
        assert heard(keeper)["message"] == "brings runs back"
        begun = heard(keeper)
        assert (begun["kind"], begun["run"], begun["attempt"], begun["ok"]) == ("resume", run, 2, True)
        assert "is at work" in local.run(*KEEP, "--once", cwd=tmp_path, code=2)[1]
        wait_until(lambda: status(local, run) is RunStatus.running, 60, "its next attempt")
        keeper.send_signal(signal.SIGINT)
        rest, told = keeper.communicate(timeout=30)
    finally:
        keeper.kill()
    assert (keeper.returncode, rest) == (130, ""), "one resubmission, and nothing about the run with the bug"
    assert "the stack and its runs go on" in told
    said, _ = local.run(*KEEP, "--once", cwd=tmp_path)
    assert "resume" not in said
    wait_until(lambda: status(local, run) is RunStatus.finished, 120, "the run goes on to its end")
    assert attempts(local, run) == [1, 2]
    assert attempts(local, failed) == [1]
