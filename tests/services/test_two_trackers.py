"""One tracker stands still, another one starts: on one log it must wait, on two logs each batch commits once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.records import Batch, RunSpec
from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.tracking.service import TrackerService
from orchestrator.tracking.wal import LogInUse
from tests.plugins.producers import Producer, series

CODE = """
import json, sys
from orchestrator.tracking.service import TrackerService

tracker = TrackerService(sys.argv[1], sys.argv[2])
print(json.dumps("up"), flush=True)
for line in sys.stdin:
    method, frames = json.loads(line)
    if method == "push":
        answer = [[int(ack.stream), ack.accepted, ack.committed] for ack in tracker.push(map(bytes.fromhex, frames))]
    else:
        answer = tracker.commit_step()
    print(json.dumps(answer), flush=True)
"""


class Other:
    """A tracker in a process of its own, which does what it is told."""

    def __init__(self, log: Path, url: str) -> None:
        command = [sys.executable, "-c", CODE, str(log), url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "up"

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def push(self, *batches: Batch) -> list[list[int]]:
        self._say(["push", [batch.encode().hex() for batch in batches]])
        return self._answer()

    def commit(self) -> bool:
        self._say(["commit", []])
        return self._answer()

    def _say(self, words: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(words), file=self._process.stdin, flush=True)

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self._process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    migrate.upgrade(database_url)
    store = Store(database_url)
    yield store
    store.close()


@pytest.mark.parametrize("committed_before", [False, True])
def test_a_frozen_tracker_and_the_one_in_its_place_commit_each_batch_once(
    tmp_path: Path, database_url: str, store: Store, committed_before: bool
) -> None:
    old = Other(tmp_path / "old", database_url)
    try:
        ticket = store.open_attempt(RunSpec(experiment="two"), now=1e9, lease_seconds=60)
        producer = Producer(ticket)
        batches = [producer.points(series(10, start)) for start in (0, 10, 20, 30)]
        assert old.push(batches[0])[0][:2] == [0, 10]
        if committed_before:
            assert old.commit()
        else:
            assert old.push(batches[1])[0] == [0, 20, 0]
        old.freeze()
        with pytest.raises(LogInUse):
            TrackerService(tmp_path / "old", database_url)
        new = TrackerService(tmp_path / "new", database_url)
        new.push([batch.encode() for batch in batches[:3]])
        assert new.commit_step()
        assert new.push([batches[2].encode()])[0].committed == 30
        old.thaw()
        # What an agent sends that was told by the new one; the old one knows nothing of 21 … 30.
        for _ in range(3):
            (answer,) = old.push(batches[3]) or [[]]
            old.commit()
        assert answer[1:] == [40, 40] or old.push(batches[3]) == [[0, 40, 40]]
        new.push([batches[3].encode()])
        new.commit_step()
        new.stop()
    finally:
        old.end()
    steps = sorted(
        step for key in ("train/loss", "val/accuracy") for step in store.points(ticket.run, key).steps.tolist()
    )
    assert steps == list(range(40))
    assert store.watermarks([producer.id]) == {(producer.id, batches[0].stream): 40, (producer.id, 1): 0}
