"""Tables on a terminal: ours are drawn as rich draws them, and rich is asked where only it can."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from orchestrator.cli import terminal
from orchestrator.cli.output import Output

HEADER = ("status", "name", "age", "last")
ROWS = [("FAILED", "brave-otter", "3d ago", "0.5"), ("RUNNING", "x", "1h ago", "12"), ("odd", "", "-", "-")]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, ...]], *, by_rich: bool, title: str = "") -> str:
    screen = Screen()
    output = Output(stdout=screen, stderr=io.StringIO())
    monkeypatch.setattr(output, "console", lambda: Console(file=screen, force_terminal=True, color_system="standard"))
    if by_rich:
        monkeypatch.setattr(terminal, "table", lambda *_, **__: None)
        monkeypatch.setattr(terminal, "styled", lambda *_: None)
    else:
        monkeypatch.setattr(output, "console", lambda: pytest.fail("rich is not needed for this"))
    output.table(HEADER, rows, right=(2, 3), title=title)
    return screen.getvalue()


def looks(shown: str) -> list[list[tuple[str, str]]]:
    """Of each line its characters with their styles; blanks have none, and those at the end do not count."""
    found = []
    for line in shown.splitlines():
        style, cells = "", []
        for escape, character in re.findall(r"\x1b\[([\d;]*)m|(.)", line):
            if character:
                cells.append((character, "" if character == " " else style))
            else:
                style = "" if escape in ("", "0") else escape
        while cells and cells[-1][0] == " ":
            cells.pop()
        found.append(cells)
    return found


@pytest.mark.parametrize("title", ["", "metrics"])
@pytest.mark.parametrize("rows", [ROWS, []])
def test_our_table_looks_like_richs(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, ...]], title: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with monkeypatch.context() as ours, monkeypatch.context() as theirs:
        mine = drawn(ours, rows, by_rich=False, title=title)
        wanted = drawn(theirs, rows, by_rich=True, title=title)
    assert looks(mine) == looks(wanted)
    assert "\x1b[1m" in mine
    assert ("\x1b[31mFAILED" in mine) == bool(rows)


@pytest.mark.parametrize("name", ["x" * 200, "ünïcode", "日本", "\x1b[31mred", "a\tb"])
def test_rich_draws_what_must_be_folded_or_measured(name: str) -> None:
    assert terminal.table(HEADER, [[(cell, "") for cell in ("FAILED", name, "-", "-")]], (), 80, {}) is None


@pytest.mark.parametrize(
    ("variables", "style", "shown"),
    [
        ({}, "red", "\x1b[31mx\x1b[0m"), ({"NO_COLOR": "1"}, "red", "x"),
        ({"NO_COLOR": "1"}, "bold", "\x1b[1mx\x1b[0m"), ({"TERM": "dumb"}, "bold", "x"), ({}, "underline", None),
    ],
)  # fmt: skip
def test_the_environment_may_switch_colours_off(variables: dict[str, str], style: str, shown: str | None) -> None:
    assert terminal.styled("x", style, variables) == shown
