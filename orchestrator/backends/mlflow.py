"""The MLflow sink: the only file that knows MLflow.

How a run looks there: the plain key is the canonical curve with its own steps and timestamps; `orc.…` tags say where
the run comes from (`orc.run_id` finds it); ±inf, which MLflow clips to ±1.8e308, is also in `orc.nonfinite.<key>`;
names that MLflow refuses are changed and a short hash is appended, with the original in `orc.key.<name>`; a parameter
that changes later, which MLflow forbids, goes to `orc.param.<name>`; artifacts are links in `orc.artifact.<name>`.

MLflow identifies a point by (key, timestamp, step, value), so everything may be sent again. Two equal points of one
key at the same step in the same millisecond are one point there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import requests
from mlflow.entities import Experiment, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from orchestrator.backends.sinks import RunFacts, Series, SinkGone, SinkRefused, SinkUnavailable, Target
from orchestrator.records import RunStatus

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_NAME = 250
MAX_PARAM = 6000
MAX_TAG = 8000
MAX_ARTIFACT_TAGS = 500

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

    def __init__(self, tracking_uri: str, *, timeout: int = 4, experiment_prefix: str = "") -> None:
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(timeout)
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] = "false"
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
        self._uri = tracking_uri
        self._timeout = timeout
        self._prefix = experiment_prefix
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}

    # -- what a run looks like in MLflow ----------------------------------------------------------------------------

    def name_for(self, name: str) -> str:
        return mlflow_name(name)

    def tags(self, run: RunFacts) -> dict[str, str]:
        ours = {
            "orc.run_id": run.id,
            "orc.project": run.project,
            "orc.attempt": str(run.attempt),
            "orc.status": run.status.value,
            "orc.reason": run.reason,
            "orc.error": run.error,
            "orc.config_hash": run.config_hash,
            "orc.directory": run.directory,
            "orc.job": run.job,
            "mlflow.runName": run.name,
            "mlflow.user": run.user,
            "mlflow.source.name": run.source,
            "mlflow.source.type": "JOB",
            "mlflow.source.git.commit": str(run.git.get("commit") or ""),
            "mlflow.source.git.branch": str(run.git.get("branch") or ""),
            "mlflow.source.git.dirty": str(run.git["dirty"]) if "dirty" in run.git else "",
            "mlflow.source.git.repoURL": str(run.git.get("remote") or ""),
            "mlflow.note.content": "\n\n".join(text for text in (run.description, *run.notes) if text),
        }
        links = {f"orc.artifact.{name}": uri for name, uri in list(run.artifacts.items())[-MAX_ARTIFACT_TAGS:]}
        # The next attempt must be able to take back a reason or an error; the rest is left out while empty.
        stays = {"orc.reason", "orc.error"} if run.attempt > 1 else set()
        named = {**run.tags, **links, **{name: text for name, text in ours.items() if text or name in stays}}
        return {mlflow_name(name): _clean(str(text), MAX_TAG) for name, text in named.items()}

    def params(self, run: RunFacts) -> dict[str, str]:
        return {mlflow_name(name): _clean(_param_text(value), MAX_PARAM) for name, value in run.params.items()}

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
        found = self._find(experiment, run.id)
        if found is not None:
            return self._target(found)
        tags = self.tags(run)
        if run.parent and (parent := self._find(experiment, run.parent)) is not None:
            tags["mlflow.parentRunId"] = parent.info.run_id
        name = _clean(run.name, MAX_NAME)
        made: Run = self._call(
            f"run {run.id}",
            lambda client: client.create_run(experiment, start_time=run.start_ms, tags=_first(tags), run_name=name),
        )
        if time.monotonic() - started < self._timeout:
            # An earlier request may have been answered too late for us to see it, yet have made the run: keep only one.
            made = self._find(experiment, run.id) or made
        return self._target(made, created=True)

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

    def set_status(self, target: Target, status: RunStatus, end_ms: int | None) -> None:
        word = STATUS[status]
        if status.is_terminal:
            self._call(f"run {target.id}", lambda client: client.set_terminated(target.id, word, end_ms), run=target)
        else:
            self._call(f"run {target.id}", lambda client: client.update_run(target.id, word), run=target)

    def close(self) -> None:
        self._client = None

    # -- inside -----------------------------------------------------------------------------------------------------

    def _find(self, experiment: str, run: str) -> Run | None:
        """The run with this `orc.run_id`. Doubles from a lost answer never got a point; they are deleted."""
        wanted = f"tags.`orc.run_id` = '{run}'"
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
        server = urlsplit(self._uri)
        page = server._replace(netloc=server.netloc.rpartition("@")[2], path=server.path.rstrip("/"))  # no password
        url = f"{urlunsplit(page)}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return Target(id=info.run_id, url=url if self._uri.startswith("http") else "", created=created)

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
            raise SinkUnavailable(self.name, _short(error)) from error

    def _translated(self, error: MlflowException, what: str, run: Target | None) -> Exception:
        code, text = str(error.error_code), _short(error)
        if code == "RESOURCE_DOES_NOT_EXIST":
            self._experiments.clear()  # perhaps it is another database now
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
