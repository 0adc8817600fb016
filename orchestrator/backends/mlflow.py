"""The MLflow sink: the only file that knows MLflow.

How a run looks there: the plain key is the canonical curve with its own steps and timestamps; `orc.…` tags say where
the run comes from (`orc.run_id` finds it); ±inf, which MLflow clips to ±1.8e308, is also in `orc.nonfinite.<key>`;
names that MLflow refuses are changed and a short hash is appended, with the original in `orc.key.<name>`; a parameter
that changes later, which MLflow forbids, goes to `orc.param.<name>`; artifacts are links in `orc.artifact.<name>`,
small ones are also copied where the server takes files. The copy of an attempt is a child run with `orc.attempt_of` and
`orc.attempt` and without `orc.run_id`, parameters and the user's tags, so that looking for those finds runs only.

MLflow identifies a point by (key, timestamp, step, value), so everything may be sent again. Two equal points of one
key at the same step in the same millisecond are one point there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mimetypes
import os
import posixpath
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests
import yaml
from mlflow.entities import Dataset, DatasetInput, Experiment, InputTag, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.backends.sinks import (
    ArtifactFacts,
    DatasetFacts,
    File,
    RunFacts,
    Series,
    SinkGone,
    SinkRefused,
    SinkUnavailable,
    Target,
)
from orchestrator.backends.small_files import NotRead, SmallFiles
from orchestrator.records import RunStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_ARTIFACT_TAGS = 500
_FAILURE = ("kind", "what", "where", "why", "done", "log")
"""Tags `orc.failure.…` of a run that failed."""
MAX_DIGEST = 36
MAX_FILES = 100
"""So many artifacts of a run are copied, the newest; all are listed in `orc/artifacts.json` (up to `MAX_LISTED`)."""
MAX_LISTED = 2000
MAX_FILE_BYTES = 1_000_000
SETTLED = 60.0
"""Seconds after a start in which a request of the process before it may still be carried out."""

STATUS: Mapping[RunStatus, str] = {
    RunStatus.created: "SCHEDULED",
    RunStatus.queued: "SCHEDULED",
    RunStatus.running: "RUNNING",
    RunStatus.paused: "RUNNING",
    RunStatus.finished: "FINISHED",
    RunStatus.failed: "FAILED",
    RunStatus.crashed: "FAILED",
    RunStatus.cancelled: "KILLED",
}
"""MLflow knows fewer states; ours is in the tag `orc.status`."""

_REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "INVALID_STATE",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_LIMIT_EXCEEDED",
    }
)
"""Errors that sending the same again will not mend. All others (also 401: a password may be put right) are tried
again.
"""

_DELETED = "it was deleted in MLflow; restore it there and it is copied again"
_BAD_CHARACTER = re.compile(r"[^/\w.\- :]")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


class MlflowSink:
    """A `Sink` (see tracking/mirror.py) that writes to an MLflow server (`http://…`) or into its database
    (`sqlite:///…`).

    One thread at a time. No request waits longer than `timeout` seconds and none is repeated here: the mirror decides
    when to try again. MLflow takes these limits from the environment only, so making a sink sets them for the whole
    process.
    """

    name = "mlflow"
    max_points = 1000
    complete = 10_000  # it takes some thousand points per second, so it could never catch up with everything
    clips_infinity = True

    def __init__(
        self, tracking_uri: str, *, timeout: int = 4, experiment_prefix: str = "", dashboard: str = ""
    ) -> None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self._uri = tracking_uri
        self._timeout = timeout
        self._prefix = experiment_prefix
        self._dashboard = dashboard
        self._small_files = SmallFiles(most_bytes=MAX_FILE_BYTES)
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._words: dict[str, str] = {}  # status of a run as we have found it there
        self._parent = ("", "")
        """A run that others name as their parent, and its id there: thousands of trials have one."""
        self._began = time.monotonic()
        self._asked: set[str] = set()
        """Runs, by what describes them, that we asked for without an answer."""

    # -- what a run looks like in MLflow ----------------------------------------------------------------------------

    def name_for(self, name: str) -> str:
        return mlflow_name(name)

    def tags(self, run: RunFacts) -> dict[str, str]:
        """An attempt's copy has no `orc.run_id`: a look-up by that finds the run itself and nothing else."""
        git = run.git
        dirty = git.get("is_dirty", git.get("dirty"))
        ours = {
            "orc.run_id": "" if run.attempt_of else run.id,
            "orc.attempt_of": run.attempt_of,
            "orc.project": run.project,
            "orc.attempt": str(run.attempt),
            "orc.status": run.status.value,
            "orc.reason": run.reason,
            "orc.error": run.error,
            **{f"orc.failure.{name}": run.failure.get(name, "") for name in _FAILURE},
            "orc.config_hash": run.config_hash,
            "orc.directory": run.directory,
            "orc.job": run.job,
            "orc.dashboard": _job_page(self._dashboard, run.job),
            "orc.host": run.host,
            "mlflow.runName": run.name,
            "mlflow.user": run.user,
            "mlflow.source.name": run.source,
            "mlflow.source.type": "JOB",
            "mlflow.source.git.commit": str(git.get("commit") or ""),
            "mlflow.source.git.branch": str(git.get("branch") or ""),
            "mlflow.source.git.dirty": "" if dirty is None else str(dirty),
            "mlflow.source.git.repoURL": str(git.get("remote") or ""),
            "mlflow.note.content": "\n\n".join(text for text in (run.description, *run.notes) if text),
        }
        newest = {artifact.name: artifact.uri for artifact in run.artifacts}
        links = {f"orc.artifact.{name}": uri for name, uri in list(newest.items())[-MAX_ARTIFACT_TAGS:]}
        links |= {f"orc.dataset.{_dataset_key(one)}": one.fingerprint or one.uri for one in run.datasets}
        # The next attempt must be able to take back a reason or an error; the rest is left out while empty.
        stays = (
            {"orc.reason", "orc.error", *(f"orc.failure.{name}" for name in _FAILURE)}
            if run.attempt > 1 or run.attempt_of
            else set()
        )
        named = {**run.tags, **links, **{name: text for name, text in ours.items() if text or name in stays}}
        return {mlflow_name(name): _clean(str(text), MAX_TAG) for name, text in named.items()}

    def params(self, run: RunFacts) -> dict[str, str]:
        return {mlflow_name(name): _clean(_param_text(value), MAX_PARAM) for name, value in run.params.items()}

    def files(self, run: RunFacts) -> list[File]:
        """The configuration, the list of artifacts, and those that are small and for eyes."""
        found = []
        if run.config:
            found.append(_document("orc/config.yaml", yaml.safe_dump(_plain(run.config), sort_keys=False)))
        if run.artifacts:
            listed = [_listed(artifact) for artifact in run.artifacts[-MAX_LISTED:]]
            found.append(_document("orc/artifacts.json", json.dumps(listed, indent=1)))
        newest = {artifact.name: artifact for artifact in run.artifacts}
        small = [artifact for artifact in newest.values() if _is_for_eyes(artifact)][-MAX_FILES:]
        for artifact in small:
            mark = artifact.sha256[:16] or _digest(f"{artifact.uri} {artifact.size_bytes} {artifact.step}")
            path = f"artifacts/{mlflow_name(artifact.name)}"
            found.append(File(path=path, mark=mark, uri=artifact.uri, directory=run.directory))
        return found

    # -- requests ---------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        self._call("its experiments", lambda client: client.search_experiments(max_results=1))

    def ensure_experiment(self, name: str) -> str:
        """Its id; created when it is not there. Raises `SinkGone` when a person deleted it."""
        name = _clean(self._prefix + name, 500)
        if name not in self._experiments:
            what = f"experiment {name!r}"
            found: Experiment | None = self._call(what, lambda client: client.get_experiment_by_name(name))
            if found is None:
                try:
                    made = self._call(what, lambda client: client.create_experiment(name))
                except SinkRefused:  # another client was faster
                    found = self._call(what, lambda client: client.get_experiment_by_name(name))
                    if found is None:
                        raise
                else:
                    self._experiments[name] = made
                    return made
            if found.lifecycle_stage == "deleted":
                raise SinkGone(self.name, what, _DELETED, True)
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def ensure_run(self, run: RunFacts) -> Target:
        started = time.monotonic()
        experiment = self.ensure_experiment(run.experiment)
        wanted = _query(run)
        found = self._find(experiment, run.id, wanted)
        if found is not None:
            return self._target(found)
        tags = self.tags(run)
        if parent := self._parent_id(experiment, run.parent):
            tags["mlflow.parentRunId"] = parent
        name = _clean(run.name, MAX_NAME)
        is_asked = wanted in self._asked or started - self._began < SETTLED
        self._asked.add(wanted)
        made: Run = self._call(
            f"run {run.id}",
            lambda client: client.create_run(experiment, start_time=run.start_ms, tags=_first(tags), run_name=name),
        )
        if is_asked and time.monotonic() - started < self._timeout:
            # An earlier request, perhaps of the mirror before this one, may have been answered too late for us to see
            # it, yet have made the run: keep only one.
            made = self._find(experiment, run.id, wanted) or made
        self._asked.discard(wanted)
        return self._target(made, created=True)

    def _parent_id(self, experiment: str, parent: str) -> str:
        """Its id there; "" without one, or as long as it is not there."""
        if parent and self._parent[0] != parent:
            found = self._find(experiment, parent, _query_of(parent))
            if found is None:
                return ""
            self._parent = parent, found.info.run_id
        return self._parent[1] if parent else ""

    def rewind(self, target: Target, mark: Any) -> bool:
        return True  # what is sent again is known by its key, time, step and value

    def mark(self, target: Target) -> Any:
        return None

    def set_tags(self, target: Target, tags: Mapping[str, str]) -> None:
        self._batch(target, tags=[RunTag(name, text) for name, text in tags.items()])

    def log_params(self, target: Target, params: Mapping[str, str]) -> None:
        try:
            self._batch(target, params=[Param(name, text) for name, text in params.items()])
        except SinkRefused:
            there = self._run(target).data.params
            changed = {name for name, text in params.items() if name in there and there[name] != text}
            if not changed:
                raise
            self._batch(
                target,
                params=[Param(name, text) for name, text in params.items() if name not in there],
                tags=[RunTag(mlflow_name(f"orc.param.{name}"), params[name]) for name in sorted(changed)],
            )

    def log_metrics(self, target: Target, series: Sequence[Series]) -> None:
        metrics = [
            Metric(one.name, value, time_ms, step)
            for one in series
            for step, time_ms, value in zip(one.steps.tolist(), one.times_ms.tolist(), one.values.tolist(), strict=True)
        ]
        self._batch(target, metrics=metrics)

    def log_datasets(self, target: Target, datasets: Sequence[DatasetFacts]) -> None:
        inputs = _inputs(datasets)
        for start in range(0, len(inputs), 100):
            some = inputs[start : start + 100]
            self._call(
                f"{len(some)} datasets of run {target.id}",
                partial(MlflowClient.log_inputs, run_id=target.id, datasets=some),
                run=target,
            )

    def upload(self, target: Target, file: File) -> None:
        data = file.data
        if data is None:
            try:
                data = self._small_files.read(file.directory, file.uri)
            except NotRead as error:
                raise SinkRefused(self.name, file.uri, str(error)) from error
        folder, name = posixpath.split(file.path)
        with tempfile.TemporaryDirectory(prefix="orc-") as directory:
            local = Path(directory) / name
            local.write_bytes(data)
            self._call(
                file.path,
                lambda client: client.log_artifact(target.id, str(local), folder or None),
            )

    def set_status(self, target: Target, status: RunStatus, end_ms: int | None) -> None:
        word = STATUS[status]
        if self._words.pop(target.id, "") == word and not status.is_terminal:
            return  # a new run is RUNNING there by itself
        if status.is_terminal:
            self._call(f"run {target.id}", lambda client: client.set_terminated(target.id, word, end_ms), run=target)
        else:
            self._call(f"run {target.id}", lambda client: client.update_run(target.id, word), run=target)

    def close(self) -> None:
        self._client = None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _find(self, experiment: str, run: str, wanted: str) -> Run | None:
        """The run that `wanted` describes. Doubles from a lost answer never got a point; they are deleted."""
        found: list[Run] = self._call(
            f"run {run}",
            lambda client: client.search_runs([experiment], wanted, run_view_type=ViewType.ALL, max_results=20),
        )
        alive = sorted(
            (one for one in found if one.info.lifecycle_stage == "active"),
            key=lambda one: (not one.data.metrics, not one.data.params, one.info.run_id),
        )
        if not alive:
            if found:
                raise SinkGone(self.name, run, _DELETED, True)
            return None
        for double in (one.info.run_id for one in alive[1:] if not one.data.metrics):
            self._call(f"run {run}", partial(MlflowClient.delete_run, run_id=double))
        return alive[0]

    def _target(self, run: Run, created: bool = False) -> Target:
        info = run.info
        self._words = {info.run_id: info.status}  # the one that is opened now
        server = urlsplit(self._uri)
        page = server._replace(netloc=server.netloc.rpartition("@")[2], path=server.path.rstrip("/"))  # no password
        url = f"{urlunsplit(page)}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return Target(
            id=info.run_id,
            url=url if self._uri.startswith("http") else "",
            created=created,
            takes_files=str(info.artifact_uri).startswith("mlflow-artifacts:"),
        )

    def _run(self, target: Target) -> Run:
        return self._call(f"run {target.id}", lambda client: client.get_run(target.id), run=target)

    def _batch(
        self, target: Target, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = ()
    ) -> None:
        self._call(
            f"{len(metrics)} points, {len(params)} parameters and {len(tags)} tags of run {target.id}",
            lambda client: client.log_batch(target.id, metrics=metrics, params=params, tags=tags, synchronous=True),
            run=target,
        )

    def _call(self, what: str, call: Callable[[MlflowClient], T], run: Target | None = None) -> T:
        try:
            if self._client is None:
                self._client = MlflowClient(tracking_uri=self._uri)
            return call(self._client)
        except MlflowException as error:
            raise self._translated(error, what, run) from error
        except (OSError, requests.RequestException) as error:
            answered = isinstance(error, requests.HTTPError)
            raise SinkUnavailable(self.name, _short(error), answered=answered) from error

    def _translated(self, error: MlflowException, what: str, run: Target | None) -> Exception:
        code, text = str(error.error_code), _short(error)
        if code == "RESOURCE_DOES_NOT_EXIST":
            self._experiments.clear()  # perhaps it is another database now
            self._parent = ("", "")
        if run is not None and code == "RESOURCE_DOES_NOT_EXIST":
            return SinkGone(self.name, run.id, text, False)
        if run is not None and "must be in the 'active' state" in text:
            return SinkGone(self.name, run.id, _DELETED, True)
        if code in _REFUSALS:
            return SinkRefused(self.name, what, text)
        # MLflow wraps failures of the connection as well as answers of a broken server in its internal error.
        cause = error.__cause__ or error.__context__
        lost = isinstance(cause, requests.RequestException) and not isinstance(cause, requests.exceptions.RetryError)
        return SinkUnavailable(self.name, text, answered=not lost)


def mlflow_name(name: str) -> str:
    """`name` if MLflow takes it as the name of a metric, parameter or tag; else the nearest one and a hash of the
    original.

    Example: `mlflow_name("val/acc@5")` is `val/acc_5-cb0a…`; `mlflow_name("loss")` is `loss`.
    """
    normal = _BAD_CHARACTER.sub("_", name)
    parts = [part if part.strip(".") else "_" * len(part) for part in normal.split("/") if part]
    normal = "/".join(parts)
    if normal == name and name and len(name) <= MAX_NAME and posixpath.normpath(name) == name:
        return name
    mark = "-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return (normal[: MAX_NAME - len(mark)].rstrip("/") or "_") + mark


def _query(run: RunFacts) -> str:
    if run.attempt_of:
        return f"tags.`orc.attempt_of` = '{run.attempt_of}' AND tags.`orc.attempt` = '{run.attempt}'"
    return _query_of(run.id)


def _query_of(run: str) -> str:
    return f"tags.`orc.run_id` = '{run}'"


def _job_page(dashboard: str, job: str) -> str:
    return f"{dashboard.rstrip('/')}/#/jobs/{job}" if dashboard and job else dashboard


def _document(path: str, text: str) -> File:
    data = text.encode("utf-8", "replace")
    return File(path=path, mark=_digest(text), data=data)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """Only what YAML has a word for."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _listed(artifact: ArtifactFacts) -> dict[str, Any]:
    return {
        "name": artifact.name, "uri": artifact.uri, "attempt": artifact.attempt, "step": artifact.step,
        "media_type": artifact.media_type, "size_bytes": artifact.size_bytes, "sha256": artifact.sha256,
    }  # fmt: skip


def _is_for_eyes(artifact: ArtifactFacts) -> bool:
    kind = artifact.media_type or mimetypes.guess_type(artifact.name)[0] or ""
    shown = kind.startswith(("text/", "image/")) or kind.rpartition("/")[2] in ("json", "yaml", "x-yaml", "xml")
    return shown and bool(artifact.uri) and (artifact.size_bytes is None or artifact.size_bytes <= MAX_FILE_BYTES)


def _dataset_key(dataset: DatasetFacts) -> str:
    return f"{dataset.name}/{dataset.split}" if dataset.split else dataset.name


def _inputs(datasets: Sequence[DatasetFacts]) -> list[DatasetInput]:
    """As MLflow keeps them: one per name and digest, with all splits it is used for."""
    splits: dict[tuple[str, str], dict[str, None]] = {}
    first: dict[tuple[str, str], DatasetFacts] = {}
    for dataset in datasets:
        key = _clean(dataset.name, 500), _dataset_digest(dataset)
        first.setdefault(key, dataset)
        splits.setdefault(key, {}).update({dataset.split: None} if dataset.split else {})
    return [
        DatasetInput(
            Dataset(
                name=name, digest=digest, source_type=urlsplit(dataset.uri).scheme or "local",
                source=json.dumps({"uri": dataset.uri}), profile=_profile(dataset),
            ),
            [InputTag("mlflow.data.context", _clean(", ".join(splits[name, digest]), 500))] if splits[name, digest]
            else [],
        )
        for (name, digest), dataset in first.items()
    ]  # fmt: skip


def _dataset_digest(dataset: DatasetFacts) -> str:
    """The fingerprint without the name of its method, as much as MLflow takes; without one, of what else is said."""
    digest = dataset.fingerprint.rpartition(":")[2][:MAX_DIGEST]
    return digest or _digest(f"{dataset.uri} {dataset.version}")


def _profile(dataset: DatasetFacts) -> str:
    known = {"num_rows": dataset.size, "version": dataset.version, "fingerprint": dataset.fingerprint}
    return json.dumps({name: value for name, value in known.items() if value not in (None, "")})


def _param_text(value: Any) -> str:
    """As Python prints it, because that is how MLflow's own users search; lists and dicts as JSON."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, tuple, dict)) else str(value)


def _clean(text: str, most: int) -> str:
    """Without what a database refuses, and short enough; an ellipsis says that something is missing."""
    text = _UNSTORABLE.sub("\ufffd", text)
    return text if len(text) <= most else text[: most - 1] + "…"


def _first(tags: Mapping[str, str]) -> dict[str, Any]:
    """Tags for the request that creates a run: only ours, the user's may be many and follow in batches of their own."""
    return {name: text for name, text in tags.items() if name.startswith(("orc.run_id", "orc.attempt", "mlflow."))}


def _short(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"
