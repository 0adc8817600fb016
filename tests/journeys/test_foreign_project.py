"""A project that is not ours, a plain DDP script for torchrun, and the same one brought over: at most ten lines."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.records import RunStatus
from tests.plugins.local_stack import LocalStack

FOREIGN = Path(__file__).parent / "foreign"
BEFORE, AFTER = FOREIGN / "ddp_before.py", FOREIGN / "ddp_after.py"
MOST_CHANGED_LINES = 10
EPOCHS = 6


@pytest.fixture(scope="module")
def local(schema_url: str) -> Iterator[LocalStack]:
    stack = LocalStack.make(schema_url)
    yield stack
    stack.remove()


def changed_lines(before: str, after: str) -> int:
    """Lines that somebody had to write or delete: those of the new file that are not in the old one, and those that
    were removed without a new one in their place. Blank lines do not count.
    """
    count = 0
    old, new = ([line.rstrip() for line in text.splitlines() if line.strip()] for text in (before, after))
    for kind, old_from, old_to, new_from, new_to in difflib.SequenceMatcher(
        None, old, new, autojunk=False
    ).get_opcodes():
        if kind != "equal":
            count += max(old_to - old_from, new_to - new_from)
    return count


def test_at_most_ten_lines_change() -> None:
    assert changed_lines("a\nb\n\nc\n", "a\nB\nB2\nc\n") == 2
    assert changed_lines("a\nb\nc\n", "a\nc\n") == 1
    before = BEFORE.read_text()
    assert 70 <= len(before.splitlines()) <= 90
    assert "orchestrator" not in before
    assert 0 < changed_lines(before, AFTER.read_text()) <= MOST_CHANGED_LINES


def test_the_readme_shows_the_lines_that_change() -> None:
    before, after = BEFORE.read_text().splitlines(), AFTER.read_text().splitlines()
    differences = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    shown = "\n".join(line for line in differences if not line.startswith("@@") and line != "+")
    readme = (FOREIGN.parents[2] / "README.md").read_text()
    assert f"```diff\n{shown}\n```" in readme
    assert f"one of {len(before)} lines" in readme
    assert f"these {changed_lines(BEFORE.read_text(), AFTER.read_text())} change" in readme


def launched(local: LocalStack, script: Path, checkpoint: Path, cwd: Path, code: int = 0) -> list[tuple[float, float]]:
    """(loss, accuracy) per epoch, as the script prints them under torchrun with two ranks."""
    words = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script))
    out, _ = local.run(*words, "--epochs", str(EPOCHS), "--checkpoint", str(checkpoint), cwd=cwd, code=code)
    return [(float(loss), float(accuracy)) for loss, accuracy in re.findall(r"loss ([\d.]+), accuracy ([\d.]+)", out)]


def test_the_project_that_was_brought_over_computes_the_same_and_everything_is_recorded(
    local: LocalStack, tmp_path: Path
) -> None:
    """The first launch of it fails after an epoch, because its directory is missing; the same command goes on."""
    original = launched(local, BEFORE, tmp_path / "before.pt", tmp_path)
    assert len(original) == EPOCHS
    missing = tmp_path / "missing"
    launched(local, AFTER, missing / "after.pt", tmp_path, code=1)
    (interrupted,) = local.store.runs(limit=10)
    found = local.store.run(interrupted.run)
    assert (found.status, found.error["rank"]) == (RunStatus.failed, 0)
    assert "missing" in found.reason
    missing.mkdir()
    again = launched(local, AFTER, missing / "after.pt", tmp_path)
    assert again == original[1:], "from its newest checkpoint on, the same as if nothing had happened"

    (row,) = local.store.runs(limit=10)
    run = local.store.run(row.run)
    assert (run.status, run.experiment, run.workers) == (RunStatus.finished, "classifier", 2)
    assert [attempt.status for attempt in local.store.attempts(run.run)] == [RunStatus.failed, RunStatus.finished]
    params = {param.name: param.value for param in local.store.params(run.run)}
    assert params["lr"] == 0.05
    assert params["epochs"] == EPOCHS
    accuracy = local.points(run.run, "test/accuracy")
    assert [round(value, 4) for value in accuracy] == [printed for _, printed in original]
    losses = [local.points(run.run, "train/loss", rank) for rank in (0, 1)]
    assert len(losses[0]) == len(losses[1]) == EPOCHS * 2048 // 64 // 2
    assert losses[0] != losses[1]
    assert round(losses[0][-1], 6) == original[-1][0]
    assert local.store.checkpoints(run.run)
