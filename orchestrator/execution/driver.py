"""The attempts of one run, from a composed config to their end. Runs in the driver: `orc run`, or the entry point of
a Ray job. Where the ranks run is a `Place`.

The driver waits, renews the attempt's lease, and says how it ended. It carries no data: metrics go from the workers'
spools to the tracker. Whatever happens to it, what was logged arrives, and a driver that vanishes is noticed by its
lease.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from orchestrator import disk
from orchestrator.account import user_name
from orchestrator.alerts.plan import planned
from orchestrator.config import (
    FailuresConfig,
    Job,
    Resume,
    load_failure_function,
    redact_text,
    redact_url,
    render,
)
from orchestrator.config.settings import Guarded, LimitsConfig, Settings
from orchestrator.directory import layout
from orchestrator.directory.identity import Identity
from orchestrator.errors import ConfigError, RunIsActive, ServiceUnavailable, UserError
from orchestrator.execution import stacks
from orchestrator.execution.lookout import Lookout
from orchestrator.execution.moving import Move, Purpose, Surroundings
from orchestrator.execution.network import with_network
from orchestrator.execution.on_ray import OnRay
from orchestrator.execution.place import Place, Tracker
from orchestrator.execution.ray_names import job_metadata
from orchestrator.execution.run_logs import driver_log, structured, with_log
from orchestrator.execution.sizing import Room, batch_text, shares_of, workers_of_attempt
from orchestrator.execution.watch import Alarm, HangRules, Limits, Watch, limit_error
from orchestrator.execution.worker import STOPPED, Plan, Returned, copy_to_storage, local_directory, log_path
from orchestrator.failures import rollback
from orchestrator.failures.classify import Evidence, FailureKind, RanksFailed, first_cause
from orchestrator.failures.explain import five_lines, headline
from orchestrator.failures.function import LOG_LINES, NoAnswer, wanted
from orchestrator.failures.policy import (
    RESPONSES,
    Abilities,
    Action,
    Course,
    Decision,
    Failure,
    Rules,
    draw_of,
    recalled,
)
from orchestrator.failures.rollback import Rollback
from orchestrator.failures.rules import patterns_of
from orchestrator.provenance.record import record
from orchestrator.records import Fact, FactKind, RunSpec, RunStatus, RunTicket
from orchestrator.stack import Stack
from orchestrator.store.names import run_id
from orchestrator.tracking.breaker import CircuitBreaker
from orchestrator.tracking.circuits import Circuits, Outages, state_from
from orchestrator.tracking.logger import Logger

logger = logging.getLogger(__name__)

FLUSH = 15.0
PATIENCE = 120.0
"""Seconds in which a restart finds the tracker again: it may have been on what the attempt before was lost with."""
PAUSE = 1.0
"""Seconds between two tries to begin a restart."""
COPIES = "directory"
"""A service of which runs are not told: of a storage that is away the rank that saves to it tells."""
SPOOL_BYTES = 64 << 10
"""What a spool takes at its beginning, and a little more."""
HEARING = 2.0
"""Seconds between two looks, before a restart, whether somebody has called it off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveView:
    """What is known of a running attempt at one moment."""

    run: str
    epoch: int | None
    step: int
    metrics: Mapping[str, float]
    rate: float
    """Points per second."""
    elapsed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an attempt ended."""

    run: str
    name: str
    experiment: str
    attempt: int
    status: RunStatus
    reason: str
    directory: str
    summaries: Mapping[str, float] = field(default_factory=dict)
    """Newest value per key."""
    links: Mapping[str, str] = field(default_factory=dict)
    error: Mapping[str, Any] = field(default_factory=dict)
    elapsed: float = 0.0


class Progress(Protocol):
    """Who watches. All methods return at once."""

    def started(self, ticket: RunTicket) -> None: ...
    def phase(self, what: str) -> None: ...
    def update(self, view: LiveView) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...


class Silent:
    """Nobody watches."""

    def started(self, ticket: RunTicket) -> None: ...
    def phase(self, what: str) -> None: ...
    def update(self, view: LiveView) -> None: ...
    def finished(self, outcome: Outcome) -> None: ...


class _Shown:
    """A watcher whose failure, a closed pipe say, ends no run and costs no record."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def started(self, ticket: RunTicket) -> None:
        self._tell(self._progress.started, ticket)

    def phase(self, what: str) -> None:
        self._tell(self._progress.phase, what)

    def update(self, view: LiveView) -> None:
        self._tell(self._progress.update, view)

    def finished(self, outcome: Outcome) -> None:
        self._tell(self._progress.finished, outcome)

    def _tell(self, word: Callable[[Any], None], what: Any) -> None:
        try:
            word(what)
        except Exception:
            logger.debug("the display failed", exc_info=True)


def train(
    job: Job,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    run: str = "",
    new_run: str = "",
    after_attempt: int = 0,
    open_place: Callable[[Stack], Place] | None = None,
    around: Callable[[Place, Stack, RunSpec], Place] | None = None,
) -> Outcome:
    """Runs `job` on the stack of `home`, as the next attempt of `run` if that is given, and waits for its end.

    `new_run` is the id that a new run shall have, `after_attempt` the attempt of `run` that is known to be over though
    it may look alive; see RunSpec. `open_place` says where: on Ray, if not given.
    `around` makes the place that is used of the one that was opened: a sweep is what its place does in the attempt.
    Everything that can be refused is refused before a run exists. Raises ConfigError, ServiceUnavailable, RunIsActive.
    A run that fails does not raise: the outcome says so.
    """
    progress = _Shown(progress or Silent())
    stack = Stack.load(home)
    # The id is chosen here, so that the Ray job can carry it from its first moment.
    new_run = new_run or run_id(time.time())
    spec = replace(spec_of(job, stack), run=run, new_run=new_run, after_attempt=after_attempt)
    rules = Rules.of(asdict(job.settings.failures))
    patterns_of(job.settings.failures.patterns)  # a mistake in them is told before anything is started
    if job.settings.failures.function:
        load_failure_function(job.settings.failures.function)
    _check_limits(job.settings.resources.limits, stack, is_sweep=around is not None)
    if around:  # what a sweep loses with its driver is for `orc sweep resume`; its trials are restarted by the sweep
        rules = replace(rules, max_preemptions=rules.max_restarts)
    progress.phase("connecting")
    place = open_place(stack) if open_place else OnRay(stack, job_metadata(spec))
    try:
        spec = replace(spec, job=place.job)
        place = around(place, stack, spec) if around else place
        place.check(job.settings)
        return _attempts(job, stack, place, replace(spec, is_sweep=around is not None), progress, rules)
    finally:
        place.close()


def _check_limits(limits: LimitsConfig, stack: Stack, *, is_sweep: bool) -> None:
    """Raises ConfigError for limits that nobody would keep to."""
    wanted = Limits.of(asdict(limits))
    if is_sweep and wanted != Limits():
        hint = "Use sweep.budget and sweep.trial_minutes, or leave it to single runs."
        raise ConfigError("resources.limits", asdict(limits), "has no meaning in a sweep.", hint)
    if wanted.needs_samples and not stack.monitoring:
        why = "cannot be kept to: this stack does not sample its machines."
        raise ConfigError("resources.limits", asdict(limits), why, "Start it with `orc up monitoring.enabled=true`.")


def _attempts(job: Job, stack: Stack, place: Place, spec: RunSpec, progress: Progress, rules: Rules) -> Outcome:
    """Attempts of one run, until one ends in a way that another would not mend, or its budget is used up."""
    history: tuple[Failure, ...] = ()
    changes: Mapping[str, Any] = {}
    is_restart = False
    outages: Outages | None = None
    # Before a run is open: from then on its lease runs, and nobody renews it until the attempt begins.
    spools = _asked(stack, place.tracker.describe)["spool_directory"]
    while True:
        _await_room(Path(spools), patience=PATIENCE if is_restart else 0.0)
        room = _room(place, job.settings, changes)
        spec = replace(spec, workers=workers_of_attempt(room, job.settings.resources))
        ticket = _opened(stack, place.tracker, spec, patience=PATIENCE + spec.lease if is_restart else 0.0)
        if not is_restart:
            history, changes = recalled(ticket.earlier)
        ticket = replace(ticket, earlier=())  # nobody below asks for it
        course = Course(history=history, rules=rules, draw=draw_of(ticket.run, ticket.attempt))
        attempt = _Attempt(job, stack, place, ticket, spools, progress, course, changes, room)
        attempt.outages = outages = outages or attempt.outages
        progress.started(ticket)
        outcome = attempt.run()
        if not attempt.decision.is_restart or attempt.is_asked_to_stop:
            return outcome
        history = (*history, attempt.failure) if attempt.failure is not None else history
        changes = {**changes, **attempt.decision.changes}
        progress.phase(f"restarting in {attempt.decision.after:.1f} s (attempt {outcome.attempt + 1})")
        if _is_called_off(place.tracker, outcome, attempt.decision.after):
            return outcome
        spec, is_restart = replace(spec, run=outcome.run, after_attempt=outcome.attempt), True


def _await_room(spools: Path, patience: float) -> None:
    """Waits until something can be logged: an attempt is opened only then. UserError after `patience` seconds."""
    deadline = time.monotonic() + patience
    while spools.is_dir():  # else whoever logs there first makes it
        try:
            with tempfile.TemporaryFile(dir=spools) as file:
                disk.reserve(file.fileno(), SPOOL_BYTES)
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                why = f"Nothing can be logged in {spools}: {(error.strerror or str(error)).lower()}."
                raise UserError(f"{why} Nothing was started. Make room there, then try again.") from error
            logger.info("nothing can be logged in %s: %s", spools, error)
        time.sleep(PAUSE)


def _room(place: Place, settings: Settings, changes: Mapping[str, Any]) -> Room:
    """Where the next attempt may be. Asked only of runs to which it matters."""
    wanted, avoid = settings.resources, changes.get("avoid", ())
    if not wanted.min_workers and not avoid:
        return Room(workers=wanted.workers)
    try:
        return place.room(wanted, avoid)
    except Exception:
        logger.warning("the cluster does not tell how many workers there is room for", exc_info=True)
        return Room(workers=wanted.workers)


def _is_called_off(tracker: Tracker, outcome: Outcome, pause: float) -> bool:
    """Waits before a restart. True as soon as somebody does not want it any more, by a signal or by cancelling."""
    heard: list[int] = []
    slices = max(math.ceil(pause / HEARING), 1)
    with _signals(heard.append):
        for _ in range(slices):
            time.sleep(pause / slices)
            if heard or _is_to_end(tracker, outcome):
                return True
    return False


def _is_to_end(tracker: Tracker, outcome: Outcome) -> bool:
    """Somebody cancelled the run while its attempt ended, or began the next one: a restart would undo that."""
    try:
        return tracker.heartbeat(outcome.run, outcome.attempt)
    except Exception:
        logger.debug("nobody tells whether the run was cancelled", exc_info=True)
        return False


def _opened(stack: Stack, tracker: Tracker, spec: RunSpec, patience: float) -> RunTicket:
    """The next attempt. For `patience` seconds tries again when the tracker or its database is away.

    Where an answer was lost, the attempt that nobody began ends with its lease; until then the run looks active.
    """
    deadline = time.monotonic() + patience
    is_answer_lost = False
    while True:
        try:
            return _asked(stack, lambda: tracker.open_run(spec))
        except (ServiceUnavailable, RunIsActive) as error:
            if time.monotonic() >= deadline or (isinstance(error, RunIsActive) and not is_answer_lost):
                raise
            is_answer_lost = True
            logger.info("the next attempt cannot begin yet: %s", error)
        time.sleep(PAUSE)


def _asked(stack: Stack, question: Callable[[], Any]) -> Any:
    """The tracker's answer. Raises ServiceUnavailable when there is none."""
    try:
        return question()
    except (ConnectionError, TimeoutError) as error:
        hint = "`orc status` tells more."
        raise ServiceUnavailable("the tracker", stack.ray_address or stack.home, f"{error}.", hint) from error


Ending = tuple[RunStatus, str, Mapping[str, Any]]
"""(status, reason, error)"""


class _Attempt:
    """The life of one attempt in the driver."""

    def __init__(
        self, job: Job, stack: Stack, place: Place, ticket: RunTicket, spools: str, progress: Progress, course: Course,
        changes: Mapping[str, Any], room: Room,
    ) -> None:  # fmt: skip
        self._job, self._stack, self._place, self._ticket, self._progress = job, stack, place, ticket, progress
        self._course = course
        self._changes, self._room = changes, room
        self._workers = workers_of_attempt(room, job.settings.resources)
        self._surroundings = Surroundings(
            place, job.settings, workers=self._workers, avoid=changes.get("avoid", ()), params=job.params,
            live=self._live,
        )  # fmt: skip
        self._move: Move | None = None
        """Why the ranks were asked to stop, where the run is to go on."""
        self._splits = int(changes.get("splits", 1))
        self._rollback = {name: changes[name] for name in rollback.KEYS if name in changes}
        self._collective_timeout = float(changes.get("timeout", job.settings.failures.collective_timeout))
        self._newest: Mapping[str, Any] = {}
        """What the tracker told of the run at the last look; {}: nothing."""
        self._limit: Alarm | None = None
        """The limit for which it was stopped."""
        self.failure: Failure | None = None
        """Once it has ended so."""
        self.decision = Decision()
        """What follows."""
        self._patterns = patterns_of(job.settings.failures.patterns)
        asked = job.settings.failures.function
        self._function = load_failure_function(asked) if asked else None
        self._tracker = place.tracker
        self._started = time.monotonic()
        self._signal = ""
        self._stop_since: float | None = None
        self._abort = False
        self._over = threading.Event()
        self._announced = ""
        self._waited_for = ""
        self._spools = spools
        self._facts = Logger(Path(spools), run=ticket.run, attempt=ticket.attempt, rank=-1)
        self._circuits = Circuits("driver")
        self._answers = self._circuits.link(
            "tracker", lost="the tracker does not answer, what is logged is sent later",
            back="the tracker answers again",
            breaker=CircuitBreaker(threshold=3, first_pause=0.5, longest_pause=5.0),
        )  # fmt: skip
        self.outages = Outages(since=time.time())
        """What the run was told of the services it needs; taken over from the attempt before."""

    @property
    def is_asked_to_stop(self) -> bool:
        """Also when the wish came too late to end the attempt: then it is not restarted."""
        return self._stop_since is not None

    def run(self) -> Outcome:
        # From here on, so that nothing slow before or after the training looks like a dead driver.
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        try:
            with _signals(self._on_signal):
                return self._finish(*self._ended(self._logged))
        finally:
            self._over.set()  # whatever happened: a lease that is renewed for ever would keep the run RUNNING

    def _ended(self, work: Callable[[], Ending]) -> Ending:
        """How the work ended. What it raises leaves a terminal state behind, too, and no secret in it."""
        try:
            return work()
        except UserError as problem:
            return self._failed("", problem)
        except Exception as problem:
            if isinstance(problem, OSError) and problem.errno in disk.NO_ROOM:
                found = first_cause(_evidence(problem, self._job.secrets), patterns=self._patterns)
                return found.status, found.reason, found.error()
            logger.exception("the driver failed")  # our own defect must be seen
            return self._failed("the orchestrator failed: ", problem)

    def _failed(self, words: str, problem: Exception) -> Ending:
        message = redact_text(str(problem), self._job.secrets)
        error = {"type": type(problem).__name__, "message": message, "rank": -1}
        return (
            RunStatus.failed,
            f"{words}{message}",
            error if not words else {**error, "kind": FailureKind.our_bug.value},
        )

    def _logged(self) -> Ending:
        """The attempt, with what the driver logs in a file of the run's directory."""
        log = log_path(self._ticket, rank=-1)
        debug = self._job.settings.tracking.debug
        with driver_log(log, self._ticket, secrets=self._job.secrets, components=debug):
            logger.info("attempt %d of run %s begins", self._ticket.attempt, self._ticket.run)
            status, reason, error = self._ended(self._described_and_trained)
            logger.info("it ended %s %s", status.value, reason)
        copy_to_storage(self._ticket, log, structured(log), *stacks.written(log.parent))
        return status, reason, error

    def _described_and_trained(self) -> Ending:
        self._describe()
        return self._train()

    # -- the three parts

    def _describe(self) -> None:
        directory = Path(local_directory(self._ticket))
        directory.mkdir(parents=True, exist_ok=True)
        write_config(directory, self._job)
        copy_to_storage(self._ticket, directory / "config.json", directory / "config.yaml")
        self._identify(RunStatus.running)
        settings = self._job.settings
        recorded = record(
            directory,
            attempt=self._ticket.attempt,
            config=self._job.resolved,
            config_hash=self._job.hash,
            settings=settings.provenance,
            code_paths=_code_paths(),
            environ=os.environ,
            secrets=self._job.secrets,
            seed=settings.run.seed,
            resources=self._place.resources,
            outside=(*_local_storage(settings.storage.url or self._stack.storage_url), self._stack.home),
        )
        copy_to_storage(self._ticket, *recorded.files)
        self._fact(FactKind.provenance, recorded.values)
        for warning in recorded.warnings if self._ticket.attempt == 1 else ():
            logger.warning("%s", warning)
            self._fact(FactKind.event, {"kind": "source-incomplete", "level": "warning", "message": warning})

    def _train(self) -> Ending:
        self._progress.phase("starting workers")
        self._tell_workers()
        lookout = self._lookout()
        if self._limit is not None:  # of hours: nothing is left for this attempt
            return self._cancelled()
        fit = _Background(self._fit)
        fit.start()
        self._surroundings.start()
        while not fit.done.wait(0.25):
            self._show()
            self._hear_of_moves()
            if self._must_abort(time.monotonic()):
                return self._cancelled(" (workers were ended after the grace time)")
            is_quiet = bool(self._waited_for) or self._move is not None or self.is_asked_to_stop
            lookout.step(time.monotonic(), is_quiet=is_quiet)
            if lookout.is_overdue:
                break
        self._show()
        if fit.error is None and not lookout.is_overdue:
            returned: Returned = fit.value
            if returned.how == STOPPED and self._move is not None and not self.is_asked_to_stop:
                return RunStatus.crashed, f"moved: {self._move.why}", self._move.error(self._live().get("step"))
            if returned.how == STOPPED:
                return self._cancelled()
            return RunStatus.finished, str(returned.tally.get("reason", "")), {}
        if self._stop_since is not None:
            return self._cancelled()
        if self._move is not None and not self._move.has_begun:
            return RunStatus.crashed, f"moved: {self._move.why}", self._move.error(None)
        if lookout.hang is not None:
            return lookout.hang.status, lookout.hang.reason, {**lookout.hang.error(), "stacks": list(lookout.files)}
        assert fit.error is not None  # it has ended, and not well
        evidence = [
            with_log(each, log_path(self._ticket, each.rank)) for each in _evidence(fit.error, self._job.secrets)
        ]
        finding = first_cause(evidence, patterns=self._patterns, world_size=self._workers)
        error = finding.error()
        if finding.kind == FailureKind.collective_timeout:
            self._progress.phase("looking at the network")
            error = with_network(error, self._place.network())
        return finding.status, finding.reason, error

    def _cancelled(self, more: str = "") -> Ending:
        error = limit_error(self._limit) if self._limit is not None else {}
        return RunStatus.cancelled, self._stop_reason() + more, error

    def _lookout(self) -> Lookout:
        """Who looks whether the ranks get on and keep to their limits. Has looked once."""
        settings = self._job.settings
        hang = HangRules.of(asdict(settings.failures.hang)) if self._place.is_watched else HangRules(least=0, start=0)
        limits, now = Limits.of(asdict(settings.resources.limits)), time.monotonic()
        watch = Watch(hang, limits, now=now, spent=self._ticket.seconds)
        lookout = Lookout(
            watch, self._place, self._ticket, live=lambda: self._newest,
            logs=log_path(self._ticket, -1).parent, saving=settings.checkpoints.wait, tell=self._tell,
            stop=self._stop_for,
        )  # fmt: skip
        lookout.step(now, is_quiet=True)
        return lookout

    def _stop_for(self, limit: Alarm) -> None:
        """The ranks save and return at their next report, as after a signal."""
        if self.is_asked_to_stop:
            return
        self._limit, self._stop_since = limit, time.monotonic()
        self._announced = f"stopping: {limit.what}"
        threading.Thread(target=self._halt, daemon=True).start()

    def _tell(self, kind: str, level: str, message: str, details: Mapping[str, Any]) -> None:
        told = {"kind": kind, "level": level, "message": message, "details": dict(details)}
        self._fact(FactKind.event, {**told, "step": self._newest.get("step")})

    def _finish(self, status: RunStatus, reason: str, error: Mapping[str, Any]) -> Outcome:
        self._progress.phase("saving the record")
        error = self._explained(status, error)
        said: dict[str, Any] = {"status": status.value, "reason": reason, "error": dict(error) or None}
        if self.decision.is_restart and not self.is_asked_to_stop:
            said["restarts"] = True  # who is told of failures need not be told of this one
        self._fact(FactKind.status, said)
        if not self._facts.wait_committed(0.5 if self._abort else FLUSH):
            logger.warning(
                "the record is not in PostgreSQL yet; it will be as soon as the tracker and the database answer"
            )
        self._facts.close()
        self._identify(status, reason)
        self._over.set()
        live = self._live()
        outcome = Outcome(
            run=self._ticket.run,
            name=self._ticket.name,
            experiment=self._ticket.experiment,
            attempt=self._ticket.attempt,
            status=status,
            reason=reason,
            directory=self._ticket.directory,
            summaries={key: value["value"] for key, value in live.get("metrics", {}).items()},
            links=self._links(),
            error=error,
            elapsed=time.monotonic() - self._started,
        )
        self._progress.finished(outcome)
        return outcome

    # -- details

    def _explained(self, status: RunStatus, error: Mapping[str, Any]) -> Mapping[str, Any]:
        """The error with what only the driver knows: what follows, and where the log is."""
        if not error:
            return error
        if self._move is not None and error.get("kind") == Purpose.resize.value:
            words = f"goes on with {'more' if self._move.has_begun else 'fewer'} workers: {error['what']}"
            self.decision = Decision(action=Action.resize, words=words)
            return {**error, "done": words, "decision": self.decision.to_json()}
        rank = error.get("rank", -1)
        step = error.get("step")
        live = self._live()
        if step is None and rank >= 0:
            step = live.get("step")
        self.failure = Failure.of(status, {**error, "step": step})
        can = self._with_rollback(self._abilities(live, self.failure.kind), error)
        self.decision = self._course.decided(self.failure, can)
        if self.decision.words and not self.is_asked_to_stop:
            self.decision = self._with_users_word(self.decision, self.failure, can, error)
        if self._limit is not None:
            self.decision = Decision(words="saved and stopped; with a higher limit `orc resume` goes on")
        if self.decision.is_restart and self.is_asked_to_stop:
            self.decision = Decision(words="not restarted: it was asked to stop")
        if self.decision.words:
            details = {"kind": self.failure.kind, **self.decision.to_json()}
            told = {"kind": "policy", "level": "warning", "message": self.decision.words, "details": details}
            self._fact(FactKind.event, {**told, "step": step})
        explained = {
            **error, "step": step, "done": self.decision.words, "decision": self.decision.to_json(),
            "log": str(log_path(self._ticket, rank)),
        }  # fmt: skip
        if status is not RunStatus.cancelled and self._move is None:
            details = {"kind": str(error.get("kind") or "unknown"), **dict(five_lines(explained))}
            told = {"kind": "failure", "level": "error", "message": headline(explained), "details": details}
            self._fact(FactKind.event, {**told, "step": step})
        return explained

    def _with_users_word(
        self, decision: Decision, failure: Failure, can: Abilities, error: Mapping[str, Any]
    ) -> Decision:
        """The decision, or what `failures.function` wants instead. What goes wrong in it is told, no more."""
        if self._function is None:
            return decision
        rank = int(error.get("rank", -1))
        log = with_log(Evidence(rank=rank, type="", message=""), log_path(self._ticket, rank)).log.splitlines()
        about = {
            "run": self._ticket.run, "attempt": self._ticket.attempt, "status": failure.status.value,
            "kind": failure.kind, "type": failure.type, "what": failure.what, "message": error.get("message", ""),
            "step": failure.step, "rank": rank, "host": failure.host, "node": failure.node, "log": log[-LOG_LINES:],
        }  # fmt: skip
        try:
            action = wanted(self._function, about, {**decision.to_json(), "words": decision.words})
            return decision if action is None else self._course.overruled(decision, action, failure, can)
        except (NoAnswer, ValueError) as problem:
            message = f"failures.function was not followed: {redact_text(str(problem), self._job.secrets)}"
            logger.warning("%s", message, exc_info=problem.__cause__)
            self._fact(FactKind.event, {"kind": "policy", "level": "warning", "message": message})
            return decision

    def _abilities(self, live: Mapping[str, Any], kind: str) -> Abilities:
        """What can be done besides trying again, by what the run has told of itself."""
        told = live.get("metrics", {}).get("perf/micro_batch", {})
        actions = {Action.longer, *([Action.halve] if float(told.get("value", 0)) >= 2 else [])}
        wanted, workers = self._job.settings.resources, 0
        response = RESPONSES.get(kind)
        if wanted.min_workers and response is not None and response.remedy is Action.shrink:
            workers = _room(self._place, self._job.settings, self._changes).workers
            actions |= {Action.shrink} if wanted.min_workers <= workers < self._workers else set()
        return Abilities(
            actions=frozenset(actions), workers=workers, splits=self._splits, timeout=self._collective_timeout
        )

    def _with_rollback(self, can: Abilities, error: Mapping[str, Any]) -> Abilities:
        """Where a guard that is told so wants it, or the train function, which may call itself diverged."""
        settings = self._job.settings.failures
        found = Rollback.of(error, self._rollback, if_told=Guarded.rollback in (settings.nan, settings.divergence))
        if found is None:
            return can
        return replace(can, actions=can.actions | {Action.rollback}, rollback=found)

    def _identify(self, status: RunStatus, reason: str = "") -> None:
        """Says in the run's directory which run this is and how it stands, for who reads it without a database."""
        file = Path(local_directory(self._ticket)) / layout.IDENTITY
        try:
            file.write_bytes(Identity.of(self._ticket, status, time.time(), reason).encode())
        except OSError as error:
            logger.warning("%s could not be written: %s", file, error)
            return
        copy_to_storage(self._ticket, file)

    def _fit(self) -> Returned:
        settings = self._job.settings
        resources = replace(settings.resources, workers=self._workers)
        try:
            return self._place.fit(self._plan(), replace(settings, resources=resources))
        finally:
            self._surroundings.close()

    def _tell_workers(self) -> None:
        """What is not as the settings say."""
        wanted = self._job.settings.resources.workers
        if self._room.note:
            logger.warning(self._room.note)
            self._fact(FactKind.event, {"kind": "avoidance", "level": "warning", "message": self._room.note})
        if self._workers != wanted:
            batch = batch_text(self._job.settings, self._workers)
            message = f"{self._workers} of {wanted} workers in this attempt: there is no room for more; {batch}"
            details = {"workers": self._workers, "wanted": wanted}
            self._fact(FactKind.event, {"kind": "elastic", "level": "info", "message": message, "details": details})

    def _hear_of_moves(self) -> None:
        """Has the ranks save and return when the run is to go on elsewhere, or with more of them; those that still wait
        for room are given up where there is room for fewer."""
        move = self._surroundings.move
        if move is None or move is self._move or self.is_asked_to_stop:
            return
        self._move = move
        what = "saving, to go on" if move.has_begun else "not waiting any longer, to begin"
        logger.info("%s: %s", move.why, what)
        self._announced = f"moving: {move.why}"
        level = "warning" if move.purpose is Purpose.leave else "info"
        told = {"kind": move.purpose.value, "level": level, "message": f"{move.why}: {what} in a new attempt"}
        self._fact(FactKind.event, told)
        threading.Thread(target=self._halt if move.has_begun else self._give_up_waiting, daemon=True).start()

    def _give_up_waiting(self) -> None:
        while not self._over.is_set():
            try:
                return self._place.end(self._ticket)
            except Exception:
                logger.debug("the attempt that waits for room could not be ended; trying again", exc_info=True)
            time.sleep(PAUSE)

    def _halt(self) -> None:
        try:
            self._tracker.halt(self._ticket.run, self._ticket.attempt)
        except Exception:
            logger.debug("the ranks are asked again with the next sign of life", exc_info=True)

    def _plan(self) -> Plan:
        settings = self._job.settings
        return Plan(
            ticket=self._ticket,
            train=self._job.train,
            user=self._job.user,
            spool_directory=self._spools,
            spool_bytes=settings.tracking.spool_mb << 20,
            when_full=settings.tracking.when_full,
            flush_timeout=settings.tracking.flush_timeout,
            seed=settings.run.seed,
            checkpoints=asdict(settings.checkpoints),
            config_hash=self._job.hash,
            secrets=self._job.secrets,
            code_paths=_code_paths(),
            threads=max(int(settings.resources.cpus_per_worker), 1),
            perf=settings.tracking.perf,
            debug=tuple(settings.tracking.debug),
            judge={"stopping": asdict(settings.stopping)},
            collective_timeout=self._collective_timeout,
            splits=self._splits,
            shares=shares_of(settings, self._workers),
            rollback=self._rollback,
            without=self._room.without,
            watch=_watch(settings.failures),
        )

    def _beat(self) -> None:
        """Renews the lease until the attempt is over; a tracker that does not answer now may answer the next time."""
        while not self._over.wait(self._job.settings.tracking.heartbeat):
            try:
                stop = self._tracker.heartbeat(self._ticket.run, self._ticket.attempt)
            except Exception:
                logger.debug("no heartbeat", exc_info=True)
                continue
            if self._move is not None or self._limit is not None:
                self._halt()  # a tracker that was started again knows nothing of it
            if stop and self._stop_since is None:
                self._stop_since = time.monotonic()
                self._announced = "stopping: cancelled"

    def _on_signal(self, number: int) -> None:
        """First signal: ask the ranks to stop at their next report. A second one: now."""
        if self._signal:
            self._abort = True
        self._signal = signal.Signals(number).name
        if self._stop_since is None:
            self._stop_since = time.monotonic()
            # Shown by the loop: printing in a signal handler may meet a print that it interrupted.
            self._announced = f"stopping: {self._signal} (again to stop at once)"
            threading.Thread(target=self._ask_to_stop, daemon=True).start()

    def _ask_to_stop(self) -> None:
        try:
            self._tracker.cancel(self._ticket.run, user_name())
        except Exception:
            logger.warning("the ranks could not be asked to stop; they are ended after the grace time", exc_info=True)

    def _must_abort(self, now: float) -> bool:
        grace = self._job.settings.failures.grace
        if self._move is not None and self._stop_since is not None:  # asked to stop on nodes that are taken away
            grace = min(grace, self._move.deadline - time.time() + now - self._stop_since)
        return self._abort or (self._stop_since is not None and now - self._stop_since > grace)

    def _stop_reason(self) -> str:
        if self._limit is not None:
            return f"limit: {self._limit.what}"
        return f"stopped by {self._signal}" if self._signal else "cancelled"

    def _show(self) -> None:
        """Tells the watcher what is new; who watches must not end a run."""
        self._newest = {}
        try:
            waits_for = self._place.waits_for()
            if waits_for and waits_for != self._waited_for:
                logger.info(waits_for)
                self._announced = self._announced or waits_for
            elif self._waited_for and not waits_for:
                self._announced = self._announced or "starting workers"
            self._waited_for = waits_for
            announced, self._announced = self._announced, ""
            if announced:
                self._progress.phase(announced)
            live = self._newest = self._live()
            self._tell_of_outages(live)
            if live:
                self._progress.update(self._view(live))
        except Exception:
            logger.debug("the display failed", exc_info=True)

    def _tell_of_outages(self, live: Mapping[str, Any]) -> None:
        """Which services of the stack the run has to do without, and which are back: each once per outage."""
        told = [state_from(raw) for raw in live.get("circuits", ())]
        for news in self.outages.news([*self._circuits.states(), *(state for state in told if state.name != COPIES)]):
            logger.log(logging.WARNING if news.is_away else logging.INFO, "%s: %s", news.kind, news.message)
            event = {"kind": news.kind, "level": news.level, "message": news.message, "details": news.details()}
            self._fact(FactKind.event, event)

    def _view(self, live: Mapping[str, Any]) -> LiveView:
        metrics = {key: value["value"] for key, value in live["metrics"].items()}
        epoch = metrics.pop("epoch", None)
        return LiveView(
            run=self._ticket.run,
            epoch=int(epoch) if epoch is not None and math.isfinite(epoch) else None,
            step=live["step"],
            metrics=metrics,
            rate=live["rate"],
            elapsed=time.monotonic() - self._started,
        )

    def _live(self) -> dict[str, Any]:
        if not self._answers.allows(time.monotonic()):
            return {}
        try:
            live = self._tracker.live(self._ticket.run)
        except Exception as error:
            logger.debug("no live values", exc_info=True)
            self._answers.failed(error, time.monotonic())
            return {}
        self._answers.succeeded(time.monotonic())
        return live

    def _fact(self, kind: FactKind, data: Mapping[str, Any]) -> None:
        """Waits for room where the disk is full: how an attempt ended only the driver knows."""
        fact = Fact(kind=kind, at=time.time(), data=data)
        deadline = time.monotonic() + PATIENCE
        is_told = False
        while True:
            try:
                return self._facts.fact(fact)
            except OSError as error:
                why = error.strerror or str(error)
                if error.errno not in disk.NO_ROOM or self._abort or time.monotonic() >= deadline:
                    logger.warning("not recorded (%s): %s %s", why, kind.value, data.get("message", ""))
                    return None
            if not is_told:
                logger.warning("the record waits for room in %s: %s", self._spools, why)
            is_told = True
            time.sleep(PAUSE)

    def _links(self) -> dict[str, str]:
        links = {"directory": redact_url(self._ticket.directory)}
        if self._stack.ray_dashboard:
            links["ray"] = self._stack.ray_dashboard
        if self._stack.mlflow_uri:
            links["mlflow"] = self._stack.mlflow_uri
        return links


class _Background:
    """Calls a function in a thread and keeps what became of it. Ray's own SIGINT handler stays out of the way there."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self.done = threading.Event()
        self.value: Any = None
        self.error: BaseException | None = None

    def start(self) -> None:
        threading.Thread(target=self._call, name="fit", daemon=True).start()

    def _call(self) -> None:
        try:
            self.value = self._function()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()


def spec_of(job: Job, stack: Stack) -> RunSpec:
    run = job.settings.run
    return RunSpec(
        experiment=run.experiment,
        project=run.project,
        user=run.user or user_name(),
        name=run.name,
        description=run.description,
        tags=dict(run.tags),
        params=job.params,
        config=job.resolved,
        config_hash=job.hash,
        storage_url=job.settings.storage.url or stack.storage_url,
        workers=job.settings.resources.workers,
        seed=run.seed,
        lease=job.settings.tracking.lease,
        resume=run.resume is Resume.auto,
        alerts=planned(job.settings.alerts, job.settings.notify, os.environ),
    )


def _watch(settings: FailuresConfig) -> dict[str, Any]:
    """The plan's part for the guards, see `training.watching.Watch`."""
    rules = {"finite": settings.nan, "divergence": settings.divergence, "gradients": settings.divergence}
    warns = [rule for rule, what in rules.items() if what is Guarded.warn]
    rolls = [rule for rule, what in rules.items() if what is Guarded.rollback]
    fails = [rule for rule, what in rules.items() if what in (Guarded.fail, Guarded.rollback)]
    return {
        "rolls": rolls,
        "warns": [*warns, "memory"] if settings.memory_growth else warns,
        "fails": fails, "losses": list(settings.losses), "every": settings.gradients_every,
    }  # fmt: skip


def _working_directory() -> list[str]:
    try:
        return [os.getcwd()]
    except OSError:
        return []  # somebody removed it


def _code_paths() -> tuple[str, ...]:
    """Where the user's code lies: the working directory and what Python was told; workers import from there."""
    told = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return tuple(dict.fromkeys([*_working_directory(), *told, *(p for p in sys.path[:1] if p)]))


def _local_storage(url: str) -> tuple[str, ...]:
    """Where run directories lie, if that is on this host's disk."""
    path = unquote(urlsplit(url).path) if url.startswith("file://") else url
    return (os.path.abspath(os.path.expanduser(path)),) if path and "://" not in path else ()


def write_config(directory: Path, job: Job) -> None:
    (directory / "config.json").write_text(render(job, "json"))
    (directory / "config.yaml").write_text(render(job, "yaml"))


def _evidence(error: BaseException, secrets: Sequence[str]) -> Sequence[Evidence]:
    if isinstance(error, RanksFailed):
        return error.evidence
    return [Evidence(rank=-1, type=type(error).__name__, message=redact_text(str(error), secrets))]


@contextlib.contextmanager
def _signals(handler: Callable[[int], None]) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 go to `handler`, in the main thread; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda n, _: handler(n)) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


__all__ = ["LiveView", "Outcome", "Progress", "log_path", "train"]
