"""`make demo`: start the stack, train the digits example, say what happened and where to look.

Needs only the standard library and the `orc` of the environment that runs it. With CI=true the stack is stopped at the
end, however that comes; otherwise it stays up for looking.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ORC = Path(sys.executable).parent / "orc"
MIRROR_WAIT = 20.0
"""Seconds that MLflow may lag behind before the link to the run there is left out."""


class DemoFailed(Exception):
    """A command of the demo failed; it has said why."""

    def __init__(self, command: list[str], code: int) -> None:
        super().__init__(command, code)
        self.command, self.code = command, code

    def __str__(self) -> str:
        return (
            f"`{shlex.join(self.command)}` ended with exit code {self.code}: see above. "
            f"`{orc_line()} doctor` looks for the cause."
        )


def orc_line() -> str:
    """How to call this orc with this data directory from the shell that called make."""
    place = os.path.relpath(ORC)
    program = str(ORC) if place.startswith("..") else place
    return program + (f" --home {shlex.quote(os.environ['ORC_HOME'])}" if os.environ.get("ORC_HOME") else "")


def orc(*arguments: str) -> None:
    """Run a verb; what it prints is for the user."""
    code = subprocess.run([ORC, *arguments]).returncode
    if code:
        raise DemoFailed(["orc", *arguments], code)


def ask_orc(*arguments: str) -> dict[str, Any]:
    """Run a verb; what it says on stderr is for the user, its JSON document is for us."""
    done = subprocess.run([ORC, *arguments, "--json"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise DemoFailed(["orc", *arguments], done.returncode)
    return json.loads(done.stdout)


def home_problem(home: Path) -> str:
    """Why the data directory cannot be used; empty if it can."""
    existing = next(path for path in (home, *home.parents) if path.exists())
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return ""
    what = "is no directory" if not existing.is_dir() else "is not writable for you"
    return f"The data directory would be {home}, but {existing} {what}. Name another: ORC_HOME=/path make demo"


def data_directory() -> Path:
    try:
        return Path(os.environ.get("ORC_HOME") or Path.home() / ".orc").absolute()
    except RuntimeError:  # no HOME, and the user has no entry in the password file
        raise SystemExit("There is no home directory. Name a data directory: ORC_HOME=/path make demo") from None


def accuracy(story: dict[str, Any]) -> tuple[str, float] | None:
    """The accuracy at the end on data that was not trained on, and its key."""
    rows = [row for row in story["summaries"] if row["key"].endswith("accuracy") and not row["key"].startswith("train")]
    row = min(rows, key=lambda row: (row["key"], row["rank"]), default=None)
    return None if row is None else (row["key"], row["last"])


def mirrored_story(run: str) -> dict[str, Any]:
    """What `orc show` says, once the mirror has caught up or has had its time."""
    deadline = time.monotonic() + MIRROR_WAIT
    while True:
        story = ask_orc("show", run)
        if "mlflow" in story["links"] or time.monotonic() > deadline:
            return story
        time.sleep(1)


def report(story: dict[str, Any], seconds: float) -> list[str]:
    """The lines that end the demo."""
    found = accuracy(story)
    links = story["links"]
    rows = [
        ("accuracy", f"{found[1]:.2%}  ({found[0]})" if found else "none was recorded"),
        ("run", f"{story['name']}  ({story['run']})"),
        ("took", f"{seconds:.0f} s, {story['workers']} workers"),
        ("look at it", f"{orc_line()} show {story['name']}"),
        (
            "MLflow",
            links.get(
                "mlflow", f"the mirror has not caught up; `{orc_line()} show {story['name']}` has the link later"
            ),
        ),
        ("Ray", f"{links['ray_dashboard']}  (asks for the token in {data_directory() / 'ray_token'})"),
    ]
    return [f"  {name:<11} {value}" for name, value in rows]


def demo() -> None:
    print("Starting the stack: PostgreSQL, MLflow, Ray", flush=True)
    orc("up")
    print("\nTraining two DDP workers on the 1,797 handwritten digits of scikit-learn", flush=True)
    started = time.monotonic()
    run = ask_orc("run", "experiment=digits")["run"]
    seconds = time.monotonic() - started
    print("", *report(mirrored_story(run), seconds), "", sep="\n", flush=True)


def main() -> int:
    problem = home_problem(data_directory())
    if problem:
        print(problem, file=sys.stderr)
        return 1
    stop_at_the_end = os.environ.get("CI", "").lower() in ("1", "true")
    code = 1
    try:
        demo()
        code = 0
    except DemoFailed as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    finally:
        if stop_at_the_end:
            down = subprocess.run([ORC, "down"]).returncode
            code = code or down
        else:
            print(f"The stack stays up; `{orc_line()} down` stops it.", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
