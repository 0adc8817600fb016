"""Optuna: a study whose content is given, row by row, and that is asked for one configuration at a time.

Akiba, Sano, Yanase, Ohta, Koyama: Optuna, KDD 2019; its TPE: Bergstra et al., Algorithms for Hyper-Parameter
Optimization, NIPS 2011. The study lies in our PostgreSQL, in a schema of its own, where Optuna's tools can read it. It
is a copy: what counts is what the sweep's own record says, and `Study.restore` brings the study into line with it.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from orchestrator.config.names import did_you_mean
from orchestrator.errors import ConfigError
from orchestrator.store.connection import CONNECT_TIMEOUT, parse, redacted

logger = logging.getLogger(__name__)

SCHEMA = "optuna"
"""Of the database: Optuna's tables have names, and a table of its own schema's version, that could be ours."""

_LOCK = 5_127_860_413
"""Advisory lock of PostgreSQL: two sweeps may start at once, and each would make the tables."""
_ATTRIBUTE = "orc"
_SPACE = "orc.space"
_STATES = {
    "running": TrialState.RUNNING,
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}

_DIRECTIONS = {"min": StudyDirection.MINIMIZE, "max": StudyDirection.MAXIMIZE}

Param = float | int | str


class State(StrEnum):
    """How a row of the study stands."""

    running = "running"
    complete = "complete"
    pruned = "pruned"
    failed = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One parameter of the study: a range of numbers, or a list of texts."""

    key: str
    low: float = 0.0
    high: float = 0.0
    """Both ends are included."""
    is_whole: bool = False
    is_log: bool = False
    choices: tuple[str, ...] = ()

    @property
    def distribution(self) -> BaseDistribution:
        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.is_whole:
            return IntDistribution(int(self.low), int(self.high), log=self.is_log)
        return FloatDistribution(self.low, self.high, log=self.is_log)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One trial of the study: what a trial of the sweep was asked for (turn 0), or was seen to give later."""

    trial: int
    turn: int
    params: Mapping[str, Param]
    state: State = State.running
    values: tuple[float, ...] = ()
    """One per objective; empty while it runs, and if it failed."""
    step: int = 0
    """Of a pruned one: how far it had got."""


class Study:
    """Rows in, parameters out. What it is asked with the same rows and the same seed gives the same.

    Not thread-safe. It asks in memory; each row is written to the database besides, if there is one. Where that fails
    there is one warning, and the study goes on without.
    """

    def __init__(
        self,
        name: str,
        axes: Sequence[Axis],
        directions: Sequence[str],
        *,
        database_url: str = "",
        sampler: str = "TPESampler",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """`directions`: min or max, one per objective.

        Raises ConfigError for a sampler that there is not, or that does not take these arguments.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._axes = list(axes)
        self._directions = [_DIRECTIONS[direction] for direction in directions]
        self._distributions = {axis.key: axis.distribution for axis in axes}
        self._sampler = _sampler(sampler, arguments or {})
        self._sampler(0)
        self._copy = _Copy(name, self._directions, database_url) if database_url else None
        self._empty()

    def ask(self, trial: int, seed: int, is_active: Callable[[str, Mapping[str, Param]], bool]) -> dict[str, Param]:
        """Parameters for that trial; then `keep` or `refuse` them. `is_active` says whether a key has a value beside
        those that were chosen before it."""
        with _quiet():
            self._study.sampler = self._sampler(seed)
            asked = self._study.ask()
            params: dict[str, Param] = {}
            for axis in self._axes:
                if is_active(axis.key, params):
                    params[axis.key] = _suggested(asked, axis)
        self._ids[trial] = self._memory.get_trial_id_from_study_id_trial_number(self._id, asked.number)
        return params

    def keep(self, trial: int, params: Mapping[str, Param]) -> None:
        """That trial runs with the parameters that were asked for."""
        if self._copy is not None:
            self._copy.add(self._frozen(Row(trial=trial, turn=0, params=params)))

    def refuse(self, trial: int) -> None:
        """The parameters that were asked for cannot be used: no sampler learns from them."""
        _end(self._memory, self._ids.pop(trial), State.failed)

    def tell(self, trial: int, state: State, values: Sequence[float] = (), step: int = 0) -> None:
        """Ends the running row of that trial."""
        _end(self._memory, self._ids.pop(trial), state, values, step)
        if self._copy is not None:
            self._copy.end(trial, state, values, step)

    def is_running(self, trial: int) -> bool:
        return trial in self._ids

    def add(self, row: Row) -> bool:
        """Another row at the end; False if its parameters are none that this study can have."""
        frozen = self._remember(row)
        if frozen is not None and self._copy is not None:
            self._copy.add(frozen)
        return frozen is not None

    def restore(self, rows: Sequence[Row], space: str) -> tuple[bool, int]:
        """Makes these the rows of the study. Failed ones need not be there, nobody learns from them.

        Of the copy, what is right stays. Returns whether that was made for the same `space` (a digest), as far as
        anybody knows, and how many of the rows do not fit into it.
        """
        self._empty()
        wanted = [row for row in rows if row.state is not State.failed]
        kept = [(row, frozen) for row in wanted if (frozen := self._remember(row)) is not None]
        is_same = self._copy.align(kept, space) if self._copy is not None else True
        return is_same, len(wanted) - len(kept)

    def flush(self) -> None:
        """Waits until the database has all rows."""
        if self._copy is not None:
            self._copy.flush()

    def _empty(self) -> None:
        self._memory = InMemoryStorage()
        self._study = optuna.create_study(storage=self._memory, study_name="sweep", directions=self._directions)
        self._id = self._memory.get_study_id_from_name("sweep")
        self._ids: dict[int, int] = {}
        """Trial -> what the storage calls its running row."""

    def _remember(self, row: Row) -> FrozenTrial | None:
        try:
            frozen = self._frozen(row)
            with _quiet():
                self._study.add_trial(frozen)
        except ValueError:
            return None
        if row.state is State.running:
            number = len(self._study.get_trials(deepcopy=False)) - 1
            self._ids[row.trial] = self._memory.get_trial_id_from_study_id_trial_number(self._id, number)
        return frozen

    def _frozen(self, row: Row) -> FrozenTrial:
        return create_trial(
            state=_STATES[row.state],
            values=list(row.values) or None,
            params=dict(row.params),
            distributions={key: self._distributions[key] for key in row.params},
            user_attrs={_ATTRIBUTE: [row.trial, row.turn]},
            intermediate_values={row.step: row.values[0]} if row.state is State.pruned else None,
        )


class _Copy:
    """The rows in the database, written by a thread: no trial waits for that. Whatever fails there is told once, and
    nothing is written any more."""

    def __init__(self, name: str, directions: Sequence[StudyDirection], database_url: str) -> None:
        self._name, self._directions, self._url = name, directions, database_url
        self._storage: RDBStorage | None = None
        self._ids: dict[int, int] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="optuna-copy")
        self._thread.submit(self._open)

    def add(self, row: FrozenTrial) -> None:
        self._thread.submit(self._added, row)

    def end(self, trial: int, state: State, values: Sequence[float], step: int) -> None:
        self._thread.submit(self._ended, trial, state, values, step)

    def align(self, wanted: Sequence[tuple[Row, FrozenTrial]], space: str) -> bool:
        """Whether what was there was made for this space."""
        return self._thread.submit(self._aligned, wanted, space).result()

    def flush(self) -> None:
        self._thread.submit(int).result()

    def _open(self) -> None:
        with self._told():
            self._storage = _storage(self._url)
            self._load(self._storage)

    def _added(self, row: FrozenTrial) -> None:
        with self._told():
            if self._storage is not None:
                self._add(self._storage, row)

    def _ended(self, trial: int, state: State, values: Sequence[float], step: int) -> None:
        with self._told():
            if self._storage is not None and trial in self._ids:
                _end(self._storage, self._ids.pop(trial), state, values, step)

    def _aligned(self, wanted: Sequence[tuple[Row, FrozenTrial]], space: str) -> bool:
        known = space
        with self._told():
            if self._storage is not None:
                storage = self._storage
                known = self._study.user_attrs.get(_SPACE, space)
                if known != space or not self._mend(storage, wanted):
                    storage.delete_study(self._id)
                    self._load(storage)
                    for _, frozen in wanted:
                        self._add(storage, frozen)
                self._study.set_user_attr(_SPACE, space)
        return bool(known == space)

    def _load(self, storage: RDBStorage) -> None:
        with _quiet():
            self._study = optuna.create_study(
                storage=storage, study_name=self._name, directions=self._directions, load_if_exists=True
            )
        self._id = storage.get_study_id_from_name(self._name)
        self._ids = {}

    def _add(self, storage: RDBStorage, frozen: FrozenTrial) -> None:
        number = storage.create_new_trial(self._id, template_trial=frozen)
        if frozen.state == TrialState.RUNNING:
            self._ids[frozen.user_attrs[_ATTRIBUTE][0]] = number

    def _mend(self, storage: RDBStorage, wanted: Sequence[tuple[Row, FrozenTrial]]) -> bool:
        """Brings the copy into line if it only lacks something; False if it holds what it should not."""
        asked = {row.trial for row, _ in wanted if row.turn == 0}
        self._ids = {}
        there: list[tuple[Row, int]] = []
        for trial in storage.get_all_trials(self._id, deepcopy=False):
            row, number = _row(trial), storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
            if row.state is State.running and (row.trial not in asked or row.turn):
                _end(storage, number, State.failed)
            elif row.state is not State.failed:
                there.append((row, number))
        pairs = list(zip(there, wanted, strict=False))
        if len(there) > len(wanted) or not all(_may_become(row, to) for (row, _), (to, _) in pairs):
            return False
        for (row, number), (to, _) in pairs:
            if row.state is State.running and to.state is State.running:
                self._ids[row.trial] = number
            elif row.state is State.running:
                _end(storage, number, to.state, to.values, to.step)
        for _, frozen in wanted[len(there) :]:
            self._add(storage, frozen)
        return True

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a thread, and of a copy: no trial shall end by it
            # Its text may hold the address with its password.
            reason = type(getattr(error, "orig", None) or error.__cause__ or error).__name__
            where = redacted(parse(self._url))
            logger.warning("optuna's study is kept in memory only: %s does not take it (%s)", where, reason)
            self._storage = None


def _end(storage: BaseStorage, number: int, state: State, values: Sequence[float] = (), step: int = 0) -> None:
    if state is State.pruned:
        storage.set_trial_intermediate_value(number, step, values[0])
    storage.set_trial_state_values(number, _STATES[state], list(values) or None)


def _row(trial: FrozenTrial) -> Row:
    number, turn = trial.user_attrs.get(_ATTRIBUTE, (-1, -1))
    state = next(state for name, state in zip(_STATES, State, strict=True) if _STATES[name] == trial.state)
    steps = trial.intermediate_values if state is State.pruned else {}
    return Row(
        trial=number,
        turn=turn,
        params=dict(trial.params),
        state=state,
        values=tuple(trial.values or ()) if state is not State.failed else (),
        step=max(steps, default=0),
    )


def _may_become(row: Row, wanted: Row) -> bool:
    """Whether it is the wanted row, or will be when it is told."""
    if (row.trial, row.turn) != (wanted.trial, wanted.turn) or dict(row.params) != dict(wanted.params):
        return False
    return row.state is State.running or row == wanted


def _suggested(asked: optuna.Trial, axis: Axis) -> Param:
    if axis.choices:
        return str(asked.suggest_categorical(axis.key, axis.choices))
    if axis.is_whole:
        return asked.suggest_int(axis.key, int(axis.low), int(axis.high), log=axis.is_log)
    return asked.suggest_float(axis.key, axis.low, axis.high, log=axis.is_log)


def _sampler(name: str, arguments: Mapping[str, Any]) -> Callable[[int], BaseSampler]:
    """What makes a sampler from a seed."""
    known = [each for each in dir(optuna.samplers) if each.endswith("Sampler") and each != "BaseSampler"]
    if name not in known:
        hint = did_you_mean(name, known) or f"There are {', '.join(known)}."
        raise ConfigError("sweep.searcher_args.sampler", name, "Optuna has no such sampler.", hint)
    made = getattr(optuna.samplers, name)
    takes = inspect.signature(made).parameters
    fixed = {"constant_liar": True, **arguments} if "constant_liar" in takes else dict(arguments)

    def make(seed: int) -> BaseSampler:
        with _quiet():
            try:
                sampler: BaseSampler = made(**fixed, **({"seed": seed} if "seed" in takes else {}))
            except (TypeError, ValueError, ImportError) as error:
                why = f"{name} cannot be made with them: {error}."
                raise ConfigError("sweep.searcher_args", dict(arguments), why) from error
        return sampler

    return make


def _storage(database_url: str) -> RDBStorage:
    """Raises SQLAlchemyError if the database is not there, or does not take tables."""
    url = parse(database_url)
    said = url.query.get("options", ())
    # What a crash of the server loses is written again: it need not wait for its disk.
    mine = f"-csearch_path={SCHEMA} -csynchronous_commit=off"
    options = " ".join([*([said] if isinstance(said, str) else said), mine])
    connect = {"options": options, "connect_timeout": CONNECT_TIMEOUT, "application_name": "orc optuna"}
    engine = sqlalchemy.create_engine(url, connect_args={"connect_timeout": CONNECT_TIMEOUT})
    try:
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_lock(:lock)"), {"lock": _LOCK})
            connection.execute(sqlalchemy.text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
            connection.commit()
            return RDBStorage(
                url.render_as_string(hide_password=False),
                engine_kwargs={"connect_args": connect, "pool_size": 1},
            )
    finally:
        engine.dispose()  # which gives the lock back


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings about arguments that may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
