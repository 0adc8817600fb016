"""Reading the log files of a run: which there are, their ends, and what is added."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.backends.storage import Storage
from orchestrator.cli import logfiles
from orchestrator.cli.logs import Follower
from orchestrator.cli.output import Output


def write(directory: Path, attempt: int, source: str, content: str) -> Path:
    path = directory / logfiles.path(attempt, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(content)
    return path


def test_sources_are_the_driver_then_ranks_in_order(tmp_path: Path) -> None:
    for source in ("rank-10", "rank-2", "driver", "other"):
        write(tmp_path, 1, source, "x\n")
    write(tmp_path, 12, "driver", "x\n")
    assert logfiles.sources(Storage(str(tmp_path)), 1) == ["driver", "rank-2", "rank-10"]
    assert logfiles.attempts(Storage(str(tmp_path))) == [1, 12]
    assert logfiles.attempts(Storage(str(tmp_path / "none"))) == []


@given(
    lines=st.lists(st.text(alphabet="ab", max_size=5), max_size=30),
    ends=st.booleans(),
    count=st.integers(0, 35),
    block=st.integers(1, 9),
)
def test_tail_gives_exactly_the_last_lines(
    lines: list[str], ends: bool, count: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("tail")
    storage = Storage(str(directory))
    content = "\n".join(lines) + ("\n" if ends and lines else "")
    (directory / "f.log").write_text(content)
    whole = content.splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logfiles, "BLOCK", block)
        offset = logfiles.tail_offset(storage, "f.log", count)
        read = list(logfiles.Reader(storage, "f.log", offset).lines(is_final=True))
    assert read == (whole[-count:] if count else [])


def test_a_reader_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    write(tmp_path, 1, "rank-0", "one\ntw")
    reader = logfiles.Reader(Storage(str(tmp_path)), logfiles.path(1, "rank-0"))
    assert list(reader.lines()) == ["one"]
    write(tmp_path, 1, "rank-0", "o\nthr")
    assert list(reader.lines()) == ["two"]
    assert list(reader.lines(is_final=True)) == ["thr"]


def test_following_sees_ranks_that_start_later_and_stops_when_the_run_has_ended(tmp_path: Path) -> None:
    write(tmp_path, 1, "rank-0", "old\nnew\n")
    stream = io.StringIO()
    pauses = 0

    def pause(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        write(tmp_path, 1, "rank-1", f"late {pauses}\n")

    follower = Follower(Storage(str(tmp_path)), 1, "all", 1, Output(stdout=stream, stderr=io.StringIO()))
    follower.run(lambda: pauses > 0, pause)
    assert stream.getvalue().splitlines() == ["rank-0 | new", *(f"rank-1 | late {n}" for n in range(1, pauses + 1))]
