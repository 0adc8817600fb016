"""A stranger reads README.md from top to bottom and types every command in it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.plugins.own_stack import OwnStack

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = ROOT / "orchestrator" / "examples" / "first_job.py"
SECONDS_PER_COMMAND = 180.0


@dataclass(frozen=True)
class Step:
    """One thing that the reader does: type a command, or save a file (`# name.py` is the first line of its text)."""

    text: str
    file: str = ""


def steps(markdown: str) -> list[Step]:
    """The bash commands and Python files of a document, in its order."""
    found: list[Step] = []
    for language, text in FENCE.findall(markdown):
        if language == "bash":
            found += [Step(command) for command in commands(text)]
        elif language == "python":
            name, _, body = text.partition("\n")
            found.append(Step(body, file=name.removeprefix("#").strip()))
    return found


def commands(block: str) -> Iterator[str]:
    """The commands of a block as bash reads them, with continued lines and here-documents whole."""
    pending = ""
    for line in block.splitlines(keepends=True):
        pending += line
        if not pending.strip() or is_comment(pending):
            pending = ""
        elif is_complete(pending):
            yield pending.strip()
            pending = ""
    assert not pending.strip(), f"this command never ends:\n{pending}"


def is_comment(text: str) -> bool:
    return all(line.lstrip().startswith("#") for line in text.splitlines())


def is_complete(text: str) -> bool:
    parsed = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, timeout=10)
    return not text.rstrip("\n").endswith("\\") and parsed.returncode == 0 and not parsed.stderr


class CommandFailed(Exception):
    """A command of the document did not do what it should; says what it printed."""

    def __init__(self, command: str, why: str, printed: str) -> None:
        super().__init__(command, why, printed)

    def __str__(self) -> str:
        command, why, printed = self.args
        return f"`{command}` {why}\n{printed}"


class Shell:
    """One bash that runs commands one after another, so that `cd`, `export` and `source` hold for the next."""

    def __init__(self, directory: Path, environment: dict[str, str], transcript: Path) -> None:
        self._transcript = transcript
        with transcript.open("w") as out:
            self._bash = subprocess.Popen(
                ["bash", "--norc", "--noprofile"], cwd=directory, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self._numbers = itertools.count()

    def run(self, command: str, timeout: float = SECONDS_PER_COMMAND) -> str:
        """What the command printed. Raises CommandFailed when its exit code is not 0 or it does not end in time."""
        mark = f"-- end of command {next(self._numbers)}:"
        start = self._transcript.stat().st_size
        assert self._bash.stdin
        self._bash.stdin.write(f"{{\n{command}\n}} </dev/null\nprintf '\\n{mark} %d\\n' $?\n")
        self._bash.stdin.flush()
        deadline = time.monotonic() + timeout
        while True:
            ended = self._bash.poll() is not None
            with self._transcript.open(errors="replace") as file:
                file.seek(start)
                printed, found, code = file.read().partition(f"\n{mark}")
            if found and code.endswith("\n"):
                if int(code):
                    raise CommandFailed(command, f"ended with exit code {int(code)}", printed)
                return printed
            if ended:
                raise CommandFailed(command, "ended the shell", printed)
            if time.monotonic() > deadline:
                raise CommandFailed(command, f"did not end within {timeout:g} s", printed)
            time.sleep(0.05)

    def save(self, name: str, text: str) -> None:
        """Write a file where the shell is now."""
        directory = Path(self.run("pwd").strip())
        (directory / name).write_text(text)

    def close(self) -> None:
        """Ends bash and what it runs in the foreground; servers have sessions of their own."""
        assert self._bash.stdin
        os.killpg(self._bash.pid, signal.SIGKILL)
        self._bash.wait()
        self._bash.stdin.close()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of this checkout, with the environment that runs the tests as its `.venv`, already installed."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "build", "*.egg-info", ".*_cache", "mlruns", "outputs"
    )
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    environment = copy / ".venv"
    environment.mkdir()
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "installed":
            (environment / entry.name).symlink_to(entry)
    stamp = "{ pwd -P; echo .venv; cat pyproject.toml constraints.txt setup.py; } | cksum"
    line = subprocess.run(["sh", "-c", stamp], cwd=copy, capture_output=True, text=True, check=True).stdout
    (environment / "installed").write_text(line + "demo\ntest\ncheck\n")
    return copy


@pytest.mark.timeout(600)
def test_every_command_of_the_readme_works(checkout: Path, tmp_path: Path) -> None:
    with OwnStack() as stack:
        shell = Shell(checkout, stack.environment, tmp_path / "transcript")
        printed = []
        try:
            for step in steps(README):
                if step.file:
                    shell.save(step.file, step.text)
                else:
                    printed.append((step.text, shell.run(step.text)))
        finally:
            shell.close()
    said = "\n".join(f"$ {command}\n{text}" for command, text in printed)
    accuracy = re.search(r"accuracy +([\d.]+)%", said)
    assert accuracy, said
    assert float(accuracy[1]) >= 97, said


def test_the_readme_has_the_commands_that_matter() -> None:
    typed = " ; ".join(step.text for step in steps(README))
    for command in ("make demo", "orc run", "orc ls", "orc show", "orc logs", "orc env", "ray job submit", "orc down"):
        assert command in typed


def test_the_first_job_is_the_example_that_ships() -> None:
    (file,) = [step for step in steps(README) if step.file]
    assert file.text.strip() == EXAMPLE.read_text().strip()


def test_the_first_job_is_short() -> None:
    lines = EXAMPLE.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("def train("))
    body = list(itertools.takewhile(lambda line: not line or line.startswith(" "), lines[start + 1 :]))
    assert len([line for line in body if line.strip()]) < 15, "at most 15 lines, with the def"


def test_commands_are_split_as_bash_reads_them() -> None:
    block = "# a comment\ncd x\n\ncat > f <<EOF\ntext\nEOF\necho a \\\n  b\nfor i in 1 2; do\n  echo $i\ndone\n"
    split = ["cd x", "cat > f <<EOF\ntext\nEOF", "echo a \\\n  b", "for i in 1 2; do\n  echo $i\ndone"]
    assert list(commands(block)) == split


def test_the_shell_keeps_its_state_and_says_what_failed(tmp_path: Path) -> None:
    shell = Shell(tmp_path, {"PATH": "/usr/bin:/bin"}, tmp_path / "transcript")
    try:
        shell.run("mkdir sub && cd sub && export X=5")
        shell.save("file.py", "content\n")
        assert shell.run("cat file.py; echo $X; printf no-newline") == "content\n5\nno-newline"
        with pytest.raises(CommandFailed, match=r"`cat nowhere` ended with exit code 1\ncat: nowhere"):
            shell.run("cat nowhere")
        with pytest.raises(CommandFailed, match="did not end within 0.2 s"):
            shell.run("sleep 60", timeout=0.2)
    finally:
        shell.close()
