"""The TensorBoard sink: the only file that knows TensorBoard. Event files on a local disk, for `tensorboard --logdir`.

How a run looks there: one directory per run, `<experiment>/<run>`, with one event file; attempts, when there is more
than one, are `<experiment>/<run>/attempt-2`. Scalars keep their own step and wall time (in milliseconds' precision),
NaN and ±inf; of a value TensorBoard keeps the 32 bits nearest to it. (Its format has doubles, too, but the data server
that TensorBoard starts by default shows none of them.) Parameters are hyperparameters (those that the run began with:
TensorBoard takes no later ones) and, like everything else that is text, a page of the text tab.

An event file can only grow, so this sink cannot know a point that it gets again. Instead `mark` is the file's size, on
the disk, and `rewind` cuts the file back to it: what a mirror wrote and did not note before it died is taken back and
written anew. While a mirror writes it holds a lock on the directory, because PostgreSQL's may go to another before
this one has noticed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.metadata import create_summary_metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from orchestrator.backends.sinks import (
    DatasetFacts,
    File,
    RunFacts,
    Series,
    SinkGone,
    SinkRefused,
    SinkUnavailable,
    Target,
)
from orchestrator.records import RunStatus
from orchestrator.store.names import path_safe

_FORMAT = "brain.Event:2"
_HPARAMS = "orc.hparams"
_ENDED = "orc.ended"

_OF_THE_DISK = frozenset(
    {errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT}
)
"""Errors that all runs have in common; others may be this one run's (its name, its directory)."""

MAX_PLACES = 4000
"""Files whose place is held in memory; others are looked up again."""

FILE_NAME = "events.out.tfevents.0.orc"
"""TensorBoard takes every file with `tfevents` in its name."""


@dataclass(slots=True)
class _Place:
    """An event file and what of it counts."""

    file: Path
    run: str
    began: float
    """Seconds since 1970."""
    params: Mapping[str, Any]
    """Hyperparameters; empty for an attempt."""
    size: int = 0
    """Bytes that are whole; what is behind them is a write that failed."""
    texts: dict[str, list[Any]] = field(default_factory=dict)
    """Texts in the file: name -> how often it was written before, digest of the newest."""


class TensorboardSink:
    """A `Sink` (see tracking/mirror.py) that writes event files below `directory`, a local path.

    One thread at a time. A directory that hangs (a dead network disk) holds its thread, and nobody else.
    """

    name = "tensorboard"
    max_points = 10_000
    complete = 1 << 62  # a file takes everything
    clips_infinity = False

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._places: OrderedDict[str, _Place] = OrderedDict()
        self._lock = -1

    # -- what a run looks like --------------------------------------------------------------------------------------

    def name_for(self, name: str) -> str:
        return name

    def tags(self, run: RunFacts) -> Mapping[str, str]:
        """Pages of the text tab."""
        about = {
            "name": run.name, "run": run.id, "attempt": run.attempt, "status": run.status.value, "reason": run.reason,
            "error": run.error, "project": run.project, "user": run.user, "source": run.source, "job": run.job,
            "host": run.host, "commit": run.git.get("commit"), "directory": run.directory,
            "configuration": run.config_hash, "description": run.description, "notes": "; ".join(run.notes),
            **{f"dataset {one.name} {one.split}".strip(): one.fingerprint or one.uri for one in run.datasets},
            **{f"tag {name}": text for name, text in run.tags.items()},
        }  # fmt: skip
        pages = {"orc/run": _table((name, value) for name, value in about.items() if value not in ("", None))}
        if run.config and not run.attempt_of:
            plain = json.loads(json.dumps(dict(run.config), default=str))
            pages["orc/config"] = "".join(f"    {line}\n" for line in yaml.safe_dump(plain).splitlines())
        return pages

    def params(self, run: RunFacts) -> Mapping[str, str]:
        return {"orc/params": _table(run.params.items())} if run.params else {}

    def files(self, run: RunFacts) -> Sequence[File]:
        return ()

    # -- files ------------------------------------------------------------------------------------------------------

    def ensure_run(self, run: RunFacts) -> Target:
        with self._told(run.id):
            self._hold_lock()
            folder = self._directory / path_safe(run.experiment) / path_safe(run.attempt_of or run.id)
            if run.attempt_of:
                folder /= f"attempt-{run.attempt}"
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / FILE_NAME
            created = not file.exists()
            file.touch()
            if created:
                _sync(folder)
        target = Target(id=str(file.relative_to(self._directory).parent), url=str(folder), created=created)
        params = {} if run.attempt_of else _hyperparameters(run.params)
        self._places[target.id] = _Place(file, run.id, run.start_ms / 1000, params)
        if len(self._places) > MAX_PLACES:
            self._places.popitem(last=False)
        return target

    def rewind(self, target: Target, mark: Any) -> bool:
        place = self._place(target)
        said = mark or {"size": 0, "texts": {}}
        with self._told(target.id):
            self._hold_lock()
            if place.file.stat().st_size < said["size"]:
                return False
            os.truncate(place.file, said["size"])
        place.size, place.texts = said["size"], dict(said["texts"])
        if not place.size:
            self._append(target, [event_pb2.Event(wall_time=place.began, file_version=_FORMAT)])
        return True

    def mark(self, target: Target) -> Any:
        place = self._place(target)
        with self._told(target.id):
            _sync(place.file)
        return {"size": place.size, "texts": dict(place.texts)}

    def set_tags(self, target: Target, tags: Mapping[str, str]) -> None:
        place = self._place(target)
        known = {name: place.texts.get(name, [-1, ""]) for name in tags}
        fresh = {name: [known[name][0] + 1, _digest(text)] for name, text in tags.items()}
        fresh = {name: said for name, said in fresh.items() if said[1] != known[name][1]}
        self._append(target, [_event(place.began, said[0], _text(name, tags[name])) for name, said in fresh.items()])
        place.texts |= fresh

    def log_params(self, target: Target, params: Mapping[str, str]) -> None:
        place = self._place(target)
        if place.params and _HPARAMS not in place.texts:
            summary = hparams_pb(dict(place.params), trial_id=place.run, start_time_secs=place.began)
            self._append(target, [event_pb2.Event(wall_time=place.began, summary=summary)])
            place.texts[_HPARAMS] = [0, ""]
        self.set_tags(target, params)

    def log_metrics(self, target: Target, series: Sequence[Series]) -> None:
        self._append(target, _scalars(series))

    def log_datasets(self, target: Target, datasets: Sequence[DatasetFacts]) -> None:
        """They are on the run's page."""

    def upload(self, target: Target, file: File) -> None:
        raise SinkRefused(self.name, file.path, "event files take no files")

    def set_status(self, target: Target, status: RunStatus, end_ms: int | None) -> None:
        """The end of a run's hyperparameter session; how it stands otherwise is on its page."""
        place = self._place(target)
        if not status.is_terminal or _HPARAMS not in place.texts or _ENDED in place.texts:
            return
        ended = place.began if end_ms is None else end_ms / 1000
        word = api_pb2.STATUS_SUCCESS if status is RunStatus.finished else api_pb2.STATUS_FAILURE
        end = plugin_data_pb2.SessionEndInfo(status=word, end_time_secs=ended)
        value = summary_pb2.Summary.Value(
            tag=hparams.SESSION_END_INFO_TAG,
            metadata=hparams.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end)),
            tensor=hparams.NULL_TENSOR,
        )
        self._append(target, [_event(ended, 0, value)])
        place.texts[_ENDED] = [0, ""]

    def ping(self) -> None:
        self._hold_lock()

    def close(self) -> None:
        self._places.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # -- inside -----------------------------------------------------------------------------------------------------

    def _place(self, target: Target) -> _Place:
        if target.id not in self._places:
            raise SinkGone(self.name, target.id, "its place is not in memory any more", False)
        self._places.move_to_end(target.id)
        return self._places[target.id]

    def _append(self, target: Target, events: Iterable[event_pb2.Event]) -> None:
        place, records = self._place(target), io.BytesIO()
        writer = RecordWriter(records)
        for event in events:
            writer.write(event.SerializeToString())
        if not records.tell():
            return
        with self._told(target.id), open(place.file, "r+b", buffering=0) as file:
            found = os.fstat(file.fileno()).st_size
            if found < place.size:
                raise SinkGone(self.name, target.id, "somebody shortened its file", False)
            if found > place.size:
                file.truncate(place.size)  # a write that failed
            file.seek(place.size)
            rest = records.getbuffer()
            while rest:
                rest = rest[file.write(rest) :]
        place.size += records.tell()

    def _hold_lock(self) -> None:
        """From the first use until `close`, or until this process ends."""
        if self._lock >= 0:
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self._directory / ".orc.lock")
        except BlockingIOError:
            raise SinkUnavailable(self.name, f"another process writes to {self._directory}") from None
        except OSError as error:
            raise SinkUnavailable(self.name, f"{error.strerror or error}: {self._directory}") from error

    @contextmanager
    def _told(self, run: str) -> Iterator[None]:
        """What the disk says, in the words of a sink."""
        try:
            yield
        except FileNotFoundError as error:
            raise SinkGone(self.name, run, f"{error.filename} is not there any more", False) from error
        except OSError as error:
            why = f"{error.strerror or error}: {error.filename or self._directory}"
            raise SinkUnavailable(self.name, why, answered=error.errno not in _OF_THE_DISK) from error


def _locked(file: Path) -> int:
    """Its descriptor, with the lock. Raises BlockingIOError when another process has it."""
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _scalars(series: Sequence[Series]) -> Iterator[event_pb2.Event]:
    """One event per point. What is too large for 32 bits is ±inf."""
    for one in series:
        with np.errstate(over="ignore"):
            values = one.values.astype(np.float32)
        for step, time_ms, value in zip(one.steps.tolist(), one.times_ms.tolist(), values.tolist(), strict=True):
            yield _event(time_ms / 1000, step, summary_pb2.Summary.Value(tag=one.name, simple_value=value))


def _event(wall_time: float, step: int, value: summary_pb2.Summary.Value) -> event_pb2.Event:
    return event_pb2.Event(wall_time=wall_time, step=step, summary=summary_pb2.Summary(value=(value,)))


def _text(name: str, text: str) -> summary_pb2.Summary.Value:
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, tensor_shape=tensor_shape_pb2.TensorShapeProto(),
        string_val=(text.encode("utf-8", "replace"),),
    )  # fmt: skip
    return summary_pb2.Summary.Value(tag=name, tensor=tensor, metadata=text_metadata("", ""))


def _hyperparameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """TensorBoard knows truth values, numbers and text."""
    return {
        name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)
        for name, value in params.items()
    }


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    """In Markdown."""
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|-|-|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
