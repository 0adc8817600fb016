"""Reading the log files of a run: which there are, their ends, and what is added."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.catalog.logs import STACKS, STRUCTURED, StoredLogs, path
from orchestrator.cli import logfiles
from orchestrator.cli.logs import Lines, follow
from orchestrator.cli.output import Output


def write(directory: Path, attempt: int, source: str, content: str) -> Path:
    file = directory / path(attempt, source)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(content)
    return file


@given(
    lines=st.lists(st.text(alphabet="ab", max_size=5), max_size=30),
    ends=st.booleans(),
    count=st.integers(0, 35),
    block=st.integers(1, 9),
)
def test_tail_gives_exactly_the_last_lines(
    lines: list[str], ends: bool, count: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("tail") / "f.log"
    content = "\n".join(lines) + ("\n" if ends and lines else "")
    file.write_text(content)
    whole = content.splitlines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logfiles, "BLOCK", block)
        read = list(logfiles.reader(logfiles.LocalLog(file), count).lines(is_final=True))
    assert read == (whole[-count:] if count else [])


def test_a_reader_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    write(tmp_path, 1, "rank-0", "one\ntw")
    reader = logfiles.Reader(logfiles.RunLog(StoredLogs(str(tmp_path)), 1, "rank-0"))
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

    lines = Lines(StoredLogs(str(tmp_path)), 1, "all", 1)
    follow(lines, Output(stdout=stream, stderr=io.StringIO()), lambda: pauses > 0, pause)
    assert stream.getvalue().splitlines() == ["rank-0 | new", *(f"rank-1 | late {n}" for n in range(1, pauses + 1))]


def test_structured_lines_of_all_ranks_come_in_the_order_of_time(tmp_path: Path) -> None:
    for rank, times in ((0, (1.0, 4.0)), (1, (2.0, 3.0))):
        write(tmp_path, 1, f"rank-{rank}", "text\n")
        write(tmp_path, 1, f"rank-{rank}.jsonl", "".join(json.dumps({"time": at}) + "\n" for at in times))
    write(tmp_path, 1, "driver", "has no structured lines\n")
    lines = Lines(StoredLogs(str(tmp_path)), 1, "all", kind=STRUCTURED)
    assert [json.loads(line)["time"] for line in lines.all(lines.names())] == [1.0, 2.0, 3.0, 4.0]
    last = Lines(StoredLogs(str(tmp_path)), 1, "all", 1, kind=STRUCTURED)
    assert [json.loads(line)["time"] for line in last.all(last.names())] == [3.0, 4.0]


def test_stacks_are_shown_as_they_are_written_and_no_other_kind_shows_them(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path, 1, f"rank-{rank}", "text\n")
        write(tmp_path, 1, f"rank-{rank}.stack", f"Rank {rank}, pid 7\nThread 0x1\n")
    lines = Lines(StoredLogs(str(tmp_path)), 1, "all", kind=STACKS)
    assert list(lines.all(lines.names())) == ["Rank 0, pid 7", "Thread 0x1", "Rank 1, pid 7", "Thread 0x1"]
    assert [lines.source(name) for name in lines.names()] == ["rank-0.stack", "rank-1.stack"]
    text = Lines(StoredLogs(str(tmp_path)), 1, "all")
    assert list(text.all(text.names())) == ["rank-0 | text", "rank-1 | text"]
