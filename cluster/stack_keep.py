"""`keep`: looks after a stack and its runs until it is interrupted. What is done is decided in `keeping.py`.

It acts through the command line alone, in processes that outlive it: `orc up`, `orc submit resume`, `orc resume
--local`. Ray is never imported here. What was tried is in `<home>/keep.json`, so that a keeper that is started again
knows it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import psutil

from cluster import processes, ray_head, stack_status, web
from cluster.keeping import Begun, Found, GiveUp, Keeper, Resubmit, Tried, Up, Wishes, can_train, tried_from
from orchestrator import application
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.stack import Stack
from orchestrator.store import open_store
from orchestrator.store.store import Store
from orchestrator.store.views import Interrupted
from orchestrator.tracking.local.client import LocalTracker, is_running
from orchestrator.tracking.local.places import places

OK, FAILED = 0, 1
UP_TIMEOUT, SUBMIT_TIMEOUT = 600.0, 300.0
SHORTEST = 0.2
"""Seconds between two looks, at least."""
PROCESSES = {"postgres": "postgres", "schema": "postgres", "redis": "redis", "mlflow": "mlflow", "api": "api"}
"""Parts of the stack, and whose process in stack.json they need. All others need Ray's head."""


class KeepIsTaken(UserError):
    """Another `orc keep` looks after the same data directory."""

    def __init__(self, home: str, pid: str) -> None:
        super().__init__(home, pid)
        self.home, self.pid = home, pid

    def __str__(self) -> str:
        return f"orc keep is at work on {self.home} already (pid {self.pid}); there is one at a time."


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepOptions:
    """What `orc keep` is told."""

    wishes: Wishes = field(default_factory=Wishes)
    interval: float = 5.0
    """Seconds between two looks."""
    is_once: bool = False
    since: float = 86_400.0
    """Seconds ago that a run may have ended to be begun again."""
    is_json: bool = False


def keep(home: Path, options: KeepOptions, out: TextIO) -> int:
    """Looks every `interval` seconds, or until it is sure once. Gives the exit code of one look: 0, all that was found
    wrong was answered; 1, something was not. Raises UserError: nothing was ever started there, or another keeper is at
    work.
    """
    Stack.load(home)
    with _alone(home):
        keeping = StackKeep(home, options, Teller(out, is_json=options.is_json))
        try:
            while True:
                answer = keeping.safe_look()
                if options.is_once and answer is not None:
                    return OK if answer else FAILED
                time.sleep(max(options.interval, SHORTEST))
        finally:
            keeping.close()


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    descriptor = os.open(home / "keep.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KeepIsTaken(str(home), os.pread(descriptor, 20, 0).decode().strip()) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


class Teller:
    """One line per thing that is worth knowing: JSON, or a time and words. The same state is told once."""

    def __init__(self, out: TextIO, *, is_json: bool) -> None:
        self._out, self._is_json = out, is_json
        self._states: dict[str, str] = {}

    def say(self, kind: str, words: str, **details: Any) -> None:
        now = time.time()
        if self._is_json:
            line = json.dumps({"at": round(now, 3), "kind": kind, "message": words, **details})
        else:
            line = f"{datetime.fromtimestamp(now):%H:%M:%S}  {words}"
        print(line, file=self._out, flush=True)

    def state(self, kind: str, words: str, **details: Any) -> None:
        """Said when it is other than it was."""
        if self._states.get(kind) != words:
            self._states[kind] = words
            self.say(kind, words, **details)


class StackKeep:
    """One keeper's world: its files, the database, the processes that it starts."""

    def __init__(self, home: Path, options: KeepOptions, tell: Teller) -> None:
        self._home, self._options, self._tell = home, options, tell
        self._file = home / "keep.json"
        self._keeper = Keeper(wishes=options.wishes, tried=_read(self._file))
        self._store: tuple[str, Store] | None = None
        self._children: list[psutil.Popen] = []

    def close(self) -> None:
        if self._store is not None:
            self._store[1].close()

    def safe_look(self) -> bool | None:
        """`look`; what it raises is told, and ends nothing but a single look: the next one may find another world."""
        try:
            return self.look()
        except Exception as error:
            if self._options.is_once:
                raise
            words = str(error) if isinstance(error, UserError) else f"unexpected {type(error).__name__}: {error}"
            self._tell.state("error", words)
            return None

    def look(self) -> bool | None:
        """Looks once, and acts. False when something that was found wrong could not be answered; None when it is not
        yet sure that something is."""
        self._children = [child for child in self._children if child.poll() is None]
        stack = Stack.load(self._home)
        if stack.is_stopped:
            self._tell.state("stack", "the stack was stopped by `orc down`: nothing is done until the next `orc up`")
            return True
        found = parts(stack)
        down = [part.name for part in found if part.is_down]
        runs = self._interrupted(stack) if can_train(found) else []
        begun = {run.run: self._begun(stack, run) for run in runs if run.run in self._keeper.tried}
        self._tell.state("stack", f"down: {', '.join(down)}" if down else "the stack is up", down=down)
        went_well = True
        gone = {run.run for run in runs if is_driver_gone(run)}
        actions = self._keeper.step(time.time(), found, runs, begun, gone)
        if not actions and self._keeper.is_unsure:
            return None
        for action in actions:
            if isinstance(action, Up):
                went_well &= self._up(action)
            elif isinstance(action, Resubmit):
                went_well &= self._resubmit(action, stack)
            else:
                self._give_up(action)
                went_well = False
        return went_well

    # -- the stack

    def _up(self, action: Up) -> bool:
        self._tell.say("up", f"bringing up what is down: {', '.join(action.parts)}", parts=list(action.parts))
        began = time.monotonic()
        command = [sys.executable, "-P", "-m", "cluster", "up", "--again", "--home", str(self._home)]
        code, said = self._run(command, UP_TIMEOUT, cwd=self._home, python_path=str(application.root()))
        seconds = round(time.monotonic() - began, 1)
        words = f"`orc up` took {seconds} s" if code == 0 else f"`orc up` failed: {_last_words(said)}"
        self._tell.say("up", words, exit_code=code, seconds=seconds)
        return code == 0

    # -- runs

    def _interrupted(self, stack: Stack) -> list[Interrupted]:
        """Empty while another keeper brings the runs of this database back."""
        try:
            store = self._opened(stack)
            is_mine = store.try_keep()
            words = "brings runs back" if is_mine else "another `orc keep` on this database brings runs back"
            self._tell.state("runs", words)
            if not is_mine:
                return []
            if self._options.wishes.is_local:
                self._wake_tracker(stack, store)
            return store.interrupted(time.time() - self._options.since)
        except ServiceUnavailable as error:
            self._tell.state("runs", f"the database cannot be asked: {error}")
            return []

    def _opened(self, stack: Stack) -> Store:
        if self._store is not None and self._store[0] != stack.database_url:
            self.close()
            self._store = None
        if self._store is None:
            self._store = (stack.database_url, open_store(stack.database_url))
        return self._store[1]

    def _wake_tracker(self, stack: Stack, store: Store) -> None:
        """Runs without Ray whose tracker is gone, too, are found by a new one."""
        if not stack.ray_address and not is_running(places(stack)) and store.running_attempts():
            with contextlib.suppress(ConnectionError, TimeoutError):
                LocalTracker(stack).describe()

    def _begun(self, stack: Stack, run: Interrupted) -> Begun:
        tried = self._keeper.tried[run.run]
        if tried.attempt != run.attempt:
            return Begun.over
        return begun_job(stack, tried.job) if tried.job else begun_process(tried)

    def _resubmit(self, action: Resubmit, stack: Stack) -> bool:
        run = action.run
        what = f"{'sweep' if run.is_sweep else 'run'} {run.name}, attempt {run.attempt + 1}"
        details = {"run": run.run, "attempt": run.attempt + 1, "times": action.times}
        directory = directory_of(run, self._home)
        if directory is None:
            where = f"{run.directory} of {run.host or 'another host'}"
            self._keeper.was_tried(action, time.time())
            self._save()
            self._tell.say("resume", f"{what}: its code was in {where}, which is not here", ok=False, **details)
            return False
        if run.job:
            self._keeper.was_tried(action, time.time(), job=action.job)
            self._save()
            command = submission(action, directory, stack)
            code, said = self._run(command, SUBMIT_TIMEOUT, cwd=directory, python_path=python_path(os.environ))
            words = f"{what}: submitted as job {action.job}" if code == 0 else f"{what}: {_last_words(said)}"
            self._tell.say("resume", words, ok=code == 0, job=action.job, **details)
            return code == 0
        child = self._started(local_command(run, self._home), run, directory)
        self._keeper.was_tried(action, time.time(), pid=child.pid, started=child.create_time())
        self._save()
        self._tell.say("resume", f"{what}: begun here as process {child.pid}", ok=True, pid=child.pid, **details)
        return True

    def _give_up(self, action: GiveUp) -> None:
        run = action.run
        words = f"{run.name} is left alone: {action.why}; `orc resume {run.name}` goes on"
        self._tell.say("give-up", words, run=run.run, attempt=run.attempt)

    def _started(self, command: Sequence[str], run: Interrupted, directory: Path) -> psutil.Popen:
        """In a session of its own, so that ctrl-C here ends nothing there."""
        log = self._home / "logs" / "keep" / f"{run.run}-{run.attempt + 1}.log"
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with log.open("ab") as said:
            child = psutil.Popen(
                command, cwd=directory, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path(os.environ)},
            )  # fmt: skip
        self._children.append(child)
        return child

    def _run(self, command: Sequence[str], timeout: float, *, cwd: Path, python_path: str) -> tuple[int, str]:
        """Exit code (-1: too slow) and what was said. It goes on when this process is interrupted."""
        log = self._home / "logs" / "keep.log"
        processes.rotate(log)
        with log.open("ab") as said:
            mark = said.tell()
            child = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, "PYTHONPATH": python_path},
            )  # fmt: skip
            try:
                code = child.wait(timeout)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                code = -1
        return code, processes.tail(log, mark)

    def _save(self) -> None:
        """Replaces the file as a whole."""
        self._keeper.forget(time.time(), 2 * self._options.since)
        fresh = self._file.with_name(f".keep.{os.getpid()}.tmp")
        fresh.write_text(json.dumps({run: tried.to_json() for run, tried in self._keeper.tried.items()}, indent=1))
        fresh.replace(self._file)


def parts(stack: Stack) -> list[Found]:
    """The stack's parts as keeping needs them. Servers of others may be silent, but are never gone."""
    found = stack_status.parts(stack)
    down = {part.name for part in found if part.status == "down"}
    recorded = {name: processes.recorded(entry) is not None for name, entry in stack.processes.items()}
    gone = {name for name in down & PROCESSES.keys() if not recorded.get(PROCESSES[name], True)}
    if (of_ray := down - PROCESSES.keys()) and stack.owns_ray:
        gone |= set() if ray_head.is_complete(Path(stack.home)) else of_ray
    return [Found(name=part.name, is_down=part.name in down, is_gone=part.name in gone) for part in found]


def begun_job(stack: Stack, job: str) -> Begun:
    """What Ray's job server says of a resubmission."""
    asked = web.get(f"{stack.ray_dashboard}/api/jobs/{job}", token=ray_head.token(stack.ray_token_path))
    status = asked.json().get("status", "") if asked.ok else ""
    known = {"PENDING": Begun.waiting, "RUNNING": Begun.waiting, "STOPPED": Begun.stopped}
    return known.get(status, Begun.over if status else Begun.unknown)


def begun_process(tried: Tried) -> Begun:
    is_alive = processes.recorded({"pid": tried.pid, "started": tried.started}) is not None
    return Begun.waiting if is_alive else Begun.over


def is_driver_gone(run: Interrupted) -> bool:
    """False also where nobody here can tell."""
    if not run.pid or run.host != socket.gethostname():
        return False
    try:
        return psutil.Process(run.pid).create_time() > run.started + 1  # a number is used again
    except psutil.Error:
        return True


def directory_of(run: Interrupted, home: Path) -> Path | None:
    """Where the run's code lies on this host; the data directory for a run that never told. None: not here."""
    if not run.directory:
        return home
    directory = Path(run.directory)
    return directory if directory.is_dir() else None


def submission(action: Resubmit, directory: Path, stack: Stack) -> list[str]:
    """The command that sends the run's next attempt. Code that came with a job travels again; what lies on the host of
    our own head is used where it is."""
    run = action.run
    words = ["submit", *(["sweep", "resume"] if run.is_sweep else ["resume"]), run.run]
    words += ["--id", action.job, "--working-dir", str(directory), "--address", stack.ray_dashboard, "--detach"]
    if stack.owns_ray and not came_with_a_job(run):
        words.append("--in-place")
    return [*_orc(Path(stack.home)), *words]


def came_with_a_job(run: Interrupted) -> bool:
    """Whether its driver ran in what Ray had unpacked."""
    return "/runtime_resources/" in run.directory


def local_command(run: Interrupted, home: Path) -> list[str]:
    return [*_orc(home), *(["sweep", "resume"] if run.is_sweep else ["resume"]), run.run, "--local"]


def _orc(home: Path) -> list[str]:
    return [sys.executable, "-m", "orchestrator.cli.main", "--home", str(home)]


def python_path(environment: Mapping[str, str]) -> str:
    """The user's own, for processes that run the user's code: without the first entry, by which we were found."""
    first, _, rest = environment.get("PYTHONPATH", "").partition(os.pathsep)
    return rest if first == str(application.root()) else environment.get("PYTHONPATH", "")


def _read(file: Path) -> dict[str, Tried]:
    try:
        return tried_from(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}


def _last_words(said: str) -> str:
    """The last lines that say something, as one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return " ".join(lines[-3:])[-500:] or "it said nothing"


def on_signal(out: TextIO) -> Callable[[int, object], None]:
    """Ends at once: nothing that was started depends on this process."""

    def ended(number: int, frame: object) -> None:
        print("\norc keep ends; the stack and its runs go on", file=out, flush=True)
        os._exit(130 if number == signal.SIGINT else OK)

    return ended
