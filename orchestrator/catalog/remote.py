"""The catalog that an API server gives, over HTTP. Imports the standard library only: `orc ls` starts with it."""

from __future__ import annotations

import functools
import http.client
import json
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode, urlsplit

from orchestrator import live_records
from orchestrator.alert_records import AlertRow, NotificationRow
from orchestrator.catalog import wire
from orchestrator.catalog.logs import path as log_path
from orchestrator.catalog.questions import LONGEST_WAIT
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.live_records import LiveRun
from orchestrator.status import RunStatus
from orchestrator.store.views import (
    ArtifactRow,
    AttemptRow,
    CheckpointRow,
    EventRow,
    ExperimentRow,
    NoteRow,
    ParamRow,
    RunDetail,
    RunRow,
    SinkLag,
    SummaryRow,
    SweepDetail,
    SweepRow,
)
from orchestrator.sweep_records import DecisionRow, JobRow, RequestRow, TrialRow

if TYPE_CHECKING:
    from orchestrator.stack import Stack
    from orchestrator.store.views import Curve, Points

Row = TypeVar("Row")
Answer = TypeVar("Answer")

TIMEOUT = 30.0
"""Seconds of silence after which the server counts as away."""
LOCAL_TIMEOUT = 10.0
"""The same for the stack's own server, beside which there is still the database."""


class HttpCatalog:
    """A Catalog over the API server at `url`. Threads may share it: it asks one question after the other.

    Answers and errors are those that DatabaseCatalog gives on the head. Raises ServiceUnavailable when the server does
    not answer, refuses the token or is of another version. `token_from` says, for people, where the token was found.
    """

    def __init__(self, url: str, token: str, *, token_from: str = "", timeout: float = TIMEOUT) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
        except ValueError as error:
            raise UserError(f"{url} is no address of an API server: {error}.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{url} is no address of an API server: write http://HOST:8600 or https://HOST/PATH.")
        if not token.isascii() or not token.isprintable():
            raise UserError(f"The token{_from(token_from)} has characters that no token has.")
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
        self._base = f"{parts.path.rstrip('/')}/api/v{wire.VERSION}"
        self._token, self._token_from = token, token_from
        self._lock = threading.Lock()
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        try:
            self._fresh = functools.partial(kind, parts.hostname, parts.port, timeout=timeout)
            self._connection = self._fresh()
        except ValueError as error:
            raise UserError(f"{url} is no address of an API server: {error}.") from None

    def check(self) -> None:
        """Raises ServiceUnavailable unless a server of this version takes the token."""
        said = self.json("server")
        if not isinstance(said, dict):
            raise self._no_server_of_ours("it does not say who it is")
        if said.get("protocol") != wire.protocol():
            raise self._unavailable(
                f"it is of version {said.get('version')} and gives other answers than this one understands.",
                "Install the same version here and there; on the head, `orc up` restarts an old server.",
            )

    def close(self) -> None:
        self._connection.close()

    # -- questions -----------------------------------------------------------------------------------------------------

    def experiments(self) -> list[ExperimentRow]:
        return self._rows(ExperimentRow, "experiments")

    def runs(
        self,
        *,
        experiment: str | None = None,
        status: RunStatus | None = None,
        tags: Mapping[str, str] | None = None,
        search: str | None = None,
        limit: int = 50,
        offset: int = 0,
        trials: bool = True,
    ) -> list[RunRow]:
        asked = [
            ("trials", None if trials else 0),
            ("experiment", experiment),
            ("status", status),
            ("search", search),
            *(("tag", f"{quote(name)}={value}") for name, value in (tags or {}).items()),
        ]
        found: dict[str, RunRow] = {}
        while len(found) < limit:
            at_once = min(limit - len(found), wire.RUNS_AT_ONCE)
            page = self._rows(RunRow, "runs", *asked, ("limit", at_once), ("offset", offset))
            # What was created meanwhile pushed rows of the last page into this one.
            found |= {row.run: row for row in page if row.run not in found}
            offset += len(page)
            if len(page) < at_once:
                break
        return list(found.values())

    def run(self, reference: str) -> RunDetail:
        return wire.from_json(RunDetail, self.json("run", ("reference", reference)))

    def attempts(self, run: str) -> list[AttemptRow]:
        return self._rows(AttemptRow, _of(run, "attempts"))

    def params(self, run: str) -> list[ParamRow]:
        return self._rows(ParamRow, _of(run, "params"))

    def notes(self, run: str) -> list[NoteRow]:
        return self._rows(NoteRow, _of(run, "notes"))

    def checkpoints(self, run: str) -> list[CheckpointRow]:
        return self._rows(CheckpointRow, _of(run, "checkpoints"))

    def artifacts(self, run: str) -> list[ArtifactRow]:
        return self._rows(ArtifactRow, _of(run, "artifacts"))

    def events(self, run: str, *, newest: int) -> list[EventRow]:
        found: list[EventRow] = []
        while len(found) < newest:
            at_once = min(newest - len(found), wire.EVENTS_AT_ONCE)
            before = found[0].id if found else None
            page = self._rows(EventRow, _of(run, "events"), ("newest", at_once), ("before", before))
            found = page + found
            if len(page) < at_once:
                break
        return found

    def summaries(self, *runs: str) -> list[SummaryRow]:
        return [row for ids in _pieces(runs) for row in self._rows(SummaryRow, "summaries", *ids)]

    def main_metrics(self, *runs: str) -> dict[str, SummaryRow]:
        return {row.run: row for ids in _pieces(runs) for row in self._rows(SummaryRow, "main_metrics", *ids)}

    def points(self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None) -> Points:
        from orchestrator.catalog.curves import joined

        return joined(self.point_blocks(run, key, rank=rank, attempt=attempt))

    def points_of(self, run: str, keys: Sequence[str]) -> dict[str, Points]:
        found: dict[str, Points] = {}
        for asked in _in_urls(keys):
            answer = self.content(_of(run, "points_of"), *(("key", key) for key in asked))
            with self._whole_answers():
                found |= zip(asked, wire.points_of_from(answer, len(asked)), strict=True)
        return found

    def point_blocks(
        self, run: str, key: str, *, rank: int | None = None, attempt: int | None = None
    ) -> Generator[Points]:
        """On a connection of its own: a long answer keeps no other question waiting."""
        asked = (("key", key), ("rank", rank), ("attempt", attempt))
        with closing(self._fresh()) as connection, self._whole_answers():
            yield from wire.points_from(self._get(connection, _of(run, "points"), *asked))

    def curve(
        self,
        run: str,
        key: str,
        *,
        rank: int = 0,
        attempt: int | None = None,
        start: int | None = None,
        stop: int | None = None,
        most: int = 2000,
    ) -> Curve:
        asked = (("key", key), ("rank", rank), ("attempt", attempt), ("start", start), ("stop", stop), ("most", most))
        answer = self.content(_of(run, "curve"), *asked)
        with self._whole_answers():
            return wire.curve_from(answer)

    def live(self, run: str, *, after: str = "", wait: float = 0.0, redis: bool = True) -> LiveRun:
        asked = (("after", after or None), ("wait_ms", int(min(wait, LONGEST_WAIT) * 1000)), ("redis", int(redis)))
        found = live_records.run_from(self.json(_of(run, "live"), *asked))
        if found is None:
            raise self._no_server_of_ours("its answer is no live run")
        return found

    def sweeps(self, *, limit: int = 50, offset: int = 0) -> list[SweepRow]:
        return self._rows(SweepRow, "sweeps", ("limit", min(limit, wire.SWEEP_ROWS_AT_ONCE)), ("offset", offset))

    def sweep(self, reference: str) -> SweepDetail:
        return wire.from_json(SweepDetail, self.json("sweep", ("reference", reference)))

    def trials(self, sweep: str, *, status: str = "", limit: int | None = None) -> list[TrialRow]:
        asked = ("status", status or None)
        return self._all(TrialRow, _of_sweep(sweep, "trials"), lambda row: row.number, -1, limit, asked)

    def sweep_jobs(self, sweep: str) -> list[JobRow]:
        return self._all(JobRow, _of_sweep(sweep, "jobs"), lambda row: row.number, -1, None)

    def decisions(self, sweep: str, *, after: int = -1, limit: int | None = None) -> list[DecisionRow]:
        return self._all(DecisionRow, _of_sweep(sweep, "decisions"), lambda row: row.seq, after, limit)

    def sweep_requests(self, sweep: str) -> list[RequestRow]:
        return self._rows(RequestRow, _of_sweep(sweep, "requests"))

    def _all(
        self, row: type[Row], path: str, number: Callable[[Row], int], after: int, limit: int | None,
        *query: tuple[str, Any],
    ) -> list[Row]:  # fmt: skip
        """Page by page, from the row behind `after`; no row moves to another page meanwhile."""
        found: list[Row] = []
        while limit is None or len(found) < limit:
            at_once = wire.SWEEP_ROWS_AT_ONCE if limit is None else min(limit - len(found), wire.SWEEP_ROWS_AT_ONCE)
            page = self._rows(row, path, *query, ("from", after + 1), ("limit", at_once))
            found += page
            if len(page) < at_once:
                break
            after = number(page[-1])
        return found

    def alerts(self, run: str | None = None, *, only_firing: bool = True) -> list[AlertRow]:
        return self._rows(AlertRow, "alerts", ("run", run), ("only_firing", int(only_firing)))

    def notifications(self, run: str | None = None) -> list[NotificationRow]:
        return self._rows(NotificationRow, "notifications", ("run", run))

    def sink_lags(self, run: str | None = None) -> list[SinkLag]:
        return self._rows(SinkLag, "sink_lags", ("run", run))

    def logs(self, run: str) -> HttpLogs:
        return HttpLogs(self, run)

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def _rows(self, row: type[Row], path: str, *query: tuple[str, Any]) -> list[Row]:
        return [wire.from_json(row, raw) for raw in self.json(path, *query)]

    def json(self, path: str, *query: tuple[str, Any]) -> Any:
        """The value of a JSON answer."""
        body = self.content(path, *query)
        try:
            return json.loads(body)
        except ValueError:
            raise self._no_server_of_ours("its answer is no JSON") from None

    def content(self, path: str, *query: tuple[str, Any]) -> bytes:
        """The whole body of an answer."""
        return self._answer(path, *query, reading=lambda response: response.read())

    def _answer(
        self, path: str, *query: tuple[str, Any], reading: Callable[[http.client.HTTPResponse], Answer]
    ) -> Answer:
        with self._lock:
            response = self._get(self._connection, path, *query)
            try:
                with self._whole_answers():
                    return reading(response)
            except ServiceUnavailable:
                self.close()
                raise

    @contextmanager
    def _whole_answers(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ValueError, OSError, http.client.HTTPException) as error:
            raise self._unavailable(f"its answer broke off ({_reason(error)}).", "Try again.") from error

    def _get(
        self, connection: http.client.HTTPConnection, path: str, *query: tuple[str, Any]
    ) -> http.client.HTTPResponse:
        """An answer whose body is still to be read. Raises what the server says, as what it is."""
        asked = urlencode([(name, value) for name, value in query if value is not None])
        response = self._asked(connection, f"{self._base}/{path}" + (f"?{asked}" if asked else ""))
        if response.status == 200:
            return response
        body = response.read()
        if response.status in (401, 403):
            raise self._unavailable(
                f"it refuses the token{_from(self._token_from)}.",
                "It takes the one in the file api_token of the head's data directory, in ORC_API_TOKEN or as a file in "
                "ORC_API_TOKEN_PATH.",
            )
        try:
            error = wire.error_from_json(json.loads(body))
        except ValueError:
            error = None
        raise error or self._no_server_of_ours(f"it says HTTP {response.status}")

    def _asked(self, connection: http.client.HTTPConnection, target: str) -> http.client.HTTPResponse:
        headers = {"Authorization": f"Bearer {self._token}", "Accept-Encoding": "identity"}
        for is_last in (False, True):
            fresh = connection.sock is None
            try:
                connection.request("GET", target, headers=headers)
                return connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A server may close a connection that was idle, at the moment in which it is used again.
                if fresh or is_last or isinstance(error, TimeoutError):
                    raise self._unavailable(
                        f"{_reason(error)}.",
                        "Is the address right, the stack up there (`orc status`), and the way to it open?",
                    ) from error
        raise AssertionError("unreachable")

    def _unavailable(self, why: str, hint: str) -> ServiceUnavailable:
        return ServiceUnavailable("api", self.url, why, hint)

    def _no_server_of_ours(self, why: str) -> ServiceUnavailable:
        return self._unavailable(f"{why}, so it is no API server of `orc`.", "Is the address right?")


class HttpLogs:
    """`LogFiles` of a run, over HTTP."""

    def __init__(self, catalog: HttpCatalog, run: str) -> None:
        self._catalog, self._run = catalog, run
        self._listing()

    def attempts(self) -> list[int]:
        return self._listing()["attempts"]

    def sources(self, attempt: int) -> dict[str, int]:
        return self._catalog.json(_of(self._run, f"logs/{int(attempt)}"))

    def read(self, attempt: int, source: str, offset: int, limit: int) -> bytes:
        log_path(attempt, source)  # refuses what is no source
        return self._catalog.content(_of(self._run, f"logs/{attempt}/{source}"), ("offset", offset), ("limit", limit))

    def uri(self, attempt: int = 0, source: str = "") -> str:
        where = self._listing()["uri"]
        return f"{where.removesuffix('logs')}{log_path(attempt, source)}" if source else where

    def _listing(self) -> dict[str, Any]:
        return self._catalog.json(_of(self._run, "logs"))


def living_server(stack: Stack) -> HttpCatalog | None:
    """The catalog of the stack's own API server, None unless it lives and is of this version."""
    entry = stack.processes.get("api")
    if not entry or not stack.api_url:
        return None
    try:
        if not _is_a_server(int(entry["pid"])):
            return None  # whoever took its port later shall not be sent the token
        token = Path(stack.api_token_path).read_text().strip()
        catalog = HttpCatalog(stack.api_url, token, timeout=LOCAL_TIMEOUT)
        catalog.check()
    except (OSError, KeyError, ValueError, UserError):
        return None
    return catalog


def _is_a_server(pid: int) -> bool:
    """Whether an API server has that number; after a reboot another process may. Raises OSError when nobody has it."""
    os.kill(pid, 0)
    try:
        return b"orchestrator.api" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:  # a system without /proc
        return not Path("/proc/self").exists()


def _of(run: str, what: str) -> str:
    return f"runs/{quote(run, safe='')}/{what}"


def _of_sweep(sweep: str, what: str) -> str:
    return f"sweeps/{quote(sweep, safe='')}/{what}"


def _pieces(runs: tuple[str, ...]) -> Iterable[list[tuple[str, str]]]:
    return ([("run", run) for run in runs[at : at + wire.IDS_AT_ONCE]] for at in range(0, len(runs), wire.IDS_AT_ONCE))


def _in_urls(keys: Sequence[str]) -> Iterator[list[str]]:
    """As many keys at once as one URL may have."""
    asked: list[str] = []
    size = 0
    for key in keys:
        more = len(quote(key, safe="")) + len("&key=")
        if asked and (size + more > wire.KEYS_BYTES or len(asked) == wire.IDS_AT_ONCE):
            yield asked
            asked, size = [], 0
        asked.append(key)
        size += more
    if asked:
        yield asked


def _from(where: str) -> str:
    return f" in {where}" if where else ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
