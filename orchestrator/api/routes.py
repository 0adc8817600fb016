"""What the API server answers: the questions of `Catalog`, one route each. `Guard` decides who may ask."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from anyio import CancelScope, fail_after
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.api.tokens import Tokens
from orchestrator.catalog import wire
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.catalog.logs import MOST as MOST_LOG_BYTES
from orchestrator.catalog.questions import LONGEST_WAIT
from orchestrator.config import redact_url
from orchestrator.errors import UserError
from orchestrator.live_records import run_document
from orchestrator.status import RunStatus
from orchestrator.store.store import Store

logger = logging.getLogger(__name__)

PREFIX = f"/api/v{wire.VERSION}"
HEALTH = f"{PREFIX}/health"
METHODS = ("GET", "HEAD")
CONNECTIONS = 3
"""To the database, kept open."""
PATIENCE = 20.0
"""Seconds that a reader may take to accept a piece of a stream, which holds one of the connections meanwhile."""
WATCHERS = 16
"""That may wait for changes at the same time, each in a thread; further ones are answered at once."""
LARGEST = 2**63 - 1
"""Of a row's id, of an offset in a file."""
SCHEMA_IS_FRESH = 10.0
"""Seconds after which a schema that was right is looked at again."""
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


class BadQuestion(UserError):
    """A parameter that means nothing."""

    def __init__(self, parameter: str, value: str, why: str) -> None:
        super().__init__(parameter, value, why)
        self.parameter, self.value, self.why = parameter, value, why

    def __str__(self) -> str:
        return f"{self.parameter}={self.value}: {self.why}"


def application(home: Path, database_url: str, version: str, redis_url: str = "") -> Starlette:
    """The server of the stack in `home`; connects to the database when first asked."""
    questions = Questions(database_url, version, redis_url)
    run = "/runs/{run}"
    routes = {
        "/health": questions.health,
        "/server": questions.server,
        "/experiments": questions.experiments,
        "/runs": questions.runs,
        "/run": questions.run,
        "/summaries": questions.summaries,
        "/main_metrics": questions.main_metrics,
        **{f"{run}/{what}": questions.of_run(what) for what in OF_RUN},
        f"{run}/events": questions.events,
        f"{run}/points": questions.points,
        f"{run}/points_of": questions.points_of,
        f"{run}/curve": questions.curve,
        f"{run}/live": questions.live,
        "/sweeps": questions.sweeps,
        "/sweep": questions.sweep,
        **{f"/sweeps/{{sweep}}/{what}": questions.of_sweep(what) for what in OF_SWEEP},
        "/sweeps/{sweep}/requests": questions.sweep_requests,
        "/alerts": questions.alerts,
        "/notifications": questions.notifications,
        "/sink_lags": questions.sink_lags,
        f"{run}/logs": questions.logs,
        f"{run}/logs/{{attempt:int}}": questions.log_sources,
        f"{run}/logs/{{attempt:int}}/{{source}}": questions.log,
    }
    return Starlette(
        routes=[Mount(PREFIX, routes=[Route(path, answer) for path, answer in routes.items()])],
        middleware=[Middleware(Guard, tokens=Tokens(home))],
        exception_handlers={UserError: _told, HTTPException: _no_such_route, Exception: _unexpected},
    )


class Guard:
    """Nothing is asked but with GET or HEAD, and nothing but the health is told without a token."""

    def __init__(self, app: ASGIApp, tokens: Tokens) -> None:
        self._app, self._tokens = app, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(scope) if scope["type"] == "http" else None
        await (refused or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        if scope["method"] not in METHODS:
            return Json(_error("MethodNotAllowed", "This API only reads."), 405, {"Allow": ", ".join(METHODS)})
        if "\0" in scope["path"] or b"%00" in scope["query_string"]:  # PostgreSQL takes none
            return Json(_error("BadQuestion", "There is a NUL in the address."), 400)
        if scope["path"] == HEALTH:
            return None
        kind, _, token = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").partition(" ")
        if kind.lower() == "bearer" and self._tokens.accept(token.strip()):
            return None
        why = "A token is needed: `Authorization: Bearer …`, as in the file api_token of the head's data directory."
        return Json(_error("Unauthorized", why), 401, {"WWW-Authenticate": "Bearer"})


OF_RUN = ("attempts", "params", "notes", "checkpoints", "artifacts")
"""Questions about one run that take nothing but its id."""
OF_SWEEP = ("trials", "jobs", "decisions")
"""Rows of a sweep that are numbered, page by page."""


class Questions:
    """The endpoints. They run in threads, because the store waits for the database."""

    def __init__(self, database_url: str, version: str, redis_url: str = "") -> None:
        self._store = Store(database_url, pool_size=CONNECTIONS, read_only=True)
        self._catalog = DatabaseCatalog(self._store, redis_url)
        self._waiting = threading.BoundedSemaphore(WATCHERS)
        self._version = version
        self._schema_is_right_until = 0.0

    def health(self, request: Request) -> Response:
        return Json({"ok": True, "version": self._version})

    def server(self, request: Request) -> Response:
        return Json({"version": self._version, "protocol": wire.protocol()})

    def experiments(self, request: Request) -> Response:
        return _rows(self._asked().experiments())

    def runs(self, request: Request) -> Response:
        given = request.query_params
        return _rows(
            self._asked().runs(
                experiment=given.get("experiment"),
                status=_status(given.get("status")),
                tags=_tags(given.getlist("tag")),
                search=given.get("search"),
                limit=_number(request, "limit", 50, most=wire.RUNS_AT_ONCE),
                offset=_number(request, "offset", 0),
                trials=bool(_number(request, "trials", 1)),
            )
        )

    def run(self, request: Request) -> Response:
        found = wire.to_json(self._asked().run(request.query_params.get("reference", "")))
        return Json(found | {"directory": redact_url(found["directory"])})

    def of_run(self, what: str) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            return _rows(getattr(self._asked(), what)(request.path_params["run"]))

        return answer

    def events(self, request: Request) -> Response:
        newest = _number(request, "newest", 50, most=wire.EVENTS_AT_ONCE)
        before = _number(request, "before", None, most=LARGEST)
        self._asked()
        return _rows(self._store.newest_events(request.path_params["run"], before=before, limit=newest))

    def summaries(self, request: Request) -> Response:
        return _rows(self._asked().summaries(*_runs(request)))

    def main_metrics(self, request: Request) -> Response:
        return _rows(self._asked().main_metrics(*_runs(request)).values())

    def points(self, request: Request) -> Response:
        self._asked()
        pieces = self._store.point_blocks(
            request.path_params["run"],
            request.query_params.get("key", ""),
            rank=_number(request, "rank", None),
            attempt=_number(request, "attempt", None),
        )
        return Stream(wire.blocks(pieces), wire.ARROW)

    def points_of(self, request: Request) -> Response:
        keys = request.query_params.getlist("key")
        if not 0 < len(keys) <= wire.IDS_AT_ONCE:
            raise BadQuestion("key", f"{len(keys)} times", f"from 1 to {wire.IDS_AT_ONCE} at once.")
        found = self._asked().points_of(request.path_params["run"], keys)
        answer = wire.points_of_to_bytes([found[key] for key in keys])
        return Response(answer, media_type=wire.ARROW, headers=HEADERS)

    def curve(self, request: Request) -> Response:
        curve = self._asked().curve(
            request.path_params["run"],
            request.query_params.get("key", ""),
            rank=_number(request, "rank", 0),
            attempt=_number(request, "attempt", None),
            start=_step(request, "start"),
            stop=_step(request, "stop"),
            most=max(1, _number(request, "most", 2000, most=wire.WINDOWS_AT_ONCE)),
        )
        return Response(wire.curve_to_bytes(curve), media_type=wire.ARROW, headers=HEADERS)

    def live(self, request: Request) -> Response:
        wait = _number(request, "wait_ms", 0, most=int(LONGEST_WAIT * 1000)) / 1000
        may_wait = wait > 0 and self._waiting.acquire(blocking=False)
        try:
            found = self._asked().live(
                request.path_params["run"], after=request.query_params.get("after", ""), wait=wait if may_wait else 0.0,
                redis=bool(_number(request, "redis", 1)),
            )  # fmt: skip
        finally:
            if may_wait:
                self._waiting.release()
        return Json(run_document(found))

    def sweeps(self, request: Request) -> Response:
        limit = _number(request, "limit", 50, most=wire.SWEEP_ROWS_AT_ONCE)
        return _rows(self._asked().sweeps(limit=limit, offset=_number(request, "offset", 0)))

    def sweep(self, request: Request) -> Response:
        return Json(wire.to_json(self._asked().sweep(request.query_params.get("reference", ""))))

    def of_sweep(self, what: str) -> Callable[[Request], Response]:
        def answer(request: Request) -> Response:
            limit = _number(request, "limit", wire.SWEEP_ROWS_AT_ONCE, most=wire.SWEEP_ROWS_AT_ONCE)
            asked = {"after": _number(request, "from", 0) - 1, "limit": limit}
            if what == "trials":
                asked["status"] = request.query_params.get("status", "")
            self._asked()
            return _rows(getattr(self._store, f"sweep_{what}")(request.path_params["sweep"], **asked))

        return answer

    def sweep_requests(self, request: Request) -> Response:
        return _rows(self._asked().sweep_requests(request.path_params["sweep"]))

    def alerts(self, request: Request) -> Response:
        only_firing = bool(_number(request, "only_firing", 1))
        return _rows(self._asked().alerts(request.query_params.get("run"), only_firing=only_firing))

    def notifications(self, request: Request) -> Response:
        return _rows(self._asked().notifications(request.query_params.get("run")))

    def sink_lags(self, request: Request) -> Response:
        return _rows(self._asked().sink_lags(request.query_params.get("run")))

    def logs(self, request: Request) -> Response:
        logs = self._asked().logs(request.path_params["run"])
        return Json({"uri": logs.uri(), "attempts": logs.attempts()})

    def log_sources(self, request: Request) -> Response:
        return Json(self._asked().logs(request.path_params["run"]).sources(request.path_params["attempt"]))

    def log(self, request: Request) -> Response:
        path = request.path_params
        offset = _number(request, "offset", 0, most=LARGEST)
        limit = _number(request, "limit", MOST_LOG_BYTES, most=MOST_LOG_BYTES)
        content = self._asked().logs(path["run"]).read(path["attempt"], path["source"], offset, limit)
        return Response(content, media_type="application/octet-stream", headers=HEADERS)

    def _asked(self) -> DatabaseCatalog:
        """The catalog, once its schema is known to be the one of this code. Raises SchemaMismatch."""
        now = time.monotonic()
        if now > self._schema_is_right_until:
            self._store.check_schema()
            self._schema_is_right_until = now + SCHEMA_IS_FRESH
        return self._catalog


# -- parameters --------------------------------------------------------------------------------------------------------


def _number(request: Request, name: str, default: Any, *, most: int = 2**31 - 1) -> Any:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and len(given) < 20):
        raise BadQuestion(name, given, "a number from 0 up is meant.")
    if int(given) > most:
        raise BadQuestion(name, given, f"at most {most} at once.")
    return int(given)


def _step(request: Request, name: str) -> int | None:
    given = request.query_params.get(name)
    if given is None:
        return None
    digits = given.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 20 and abs(int(given)) <= LARGEST):
        raise BadQuestion(name, given, "a step is meant, a number of 64 bits.")
    return int(given)


def _tags(given: Iterable[str]) -> dict[str, str]:
    """Names are quoted once more, so that they may have a `=`."""
    tags = {unquote(name): value for name, _, value in (tag.partition("=") for tag in given)}
    for name in tags:
        if "\0" in name:
            raise BadQuestion("tag", name.replace("\0", "�"), "there is a NUL in it.")
    return tags


def _status(given: str | None) -> RunStatus | None:
    try:
        return None if given is None else RunStatus(given)
    except ValueError:
        raise BadQuestion("status", given or "", f"there are {', '.join(RunStatus)}.") from None


def _runs(request: Request) -> list[str]:
    runs = request.query_params.getlist("run")
    if len(runs) > wire.IDS_AT_ONCE:
        raise BadQuestion("run", f"{len(runs)} times", f"at most {wire.IDS_AT_ONCE} at once.")
    return runs


# -- answers -----------------------------------------------------------------------------------------------------------


class Json(Response):
    """A JSON document, compact and strict."""

    def __init__(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(document, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        more = HEADERS | (headers or {})
        super().__init__(text.encode(errors="replace"), status, more, media_type="application/json")


class Stream(StreamingResponse):
    """Bytes as they come. What makes them is closed at the end, also when the reader left before it or stopped reading
    for `PATIENCE`: the answer then ends without its last block."""

    def __init__(self, pieces: Generator[bytes], media_type: str) -> None:
        self._pieces = pieces
        first = next(pieces)  # what goes wrong at once shall be an answer of its own
        super().__init__(itertools.chain([first], pieces), media_type=media_type, headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def patiently(message: Message) -> None:
            with fail_after(PATIENCE):
                await send(message)

        try:
            await super().__call__(scope, receive, patiently)
        except TimeoutError:
            logger.warning("a reader took nothing for %d s: %s is cut off", PATIENCE, scope["path"])
        finally:
            with CancelScope(shield=True):
                await run_in_threadpool(self._pieces.close)


def _rows(rows: Iterable[Any]) -> Json:
    return Json([wire.to_json(row) for row in rows])


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"type": kind, "message": message, "arguments": []}}


def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    return Json(*wire.error_to_json(error))


def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Json(_error("NoSuchRoute", f"{request.url.path}: {error.detail}."), error.status_code)


def _unexpected(request: Request, error: Exception) -> Response:
    """The traceback goes to the server's log, not to the reader."""
    return Json(_error(type(error).__name__, "unexpected; the server's log tells more."), 500)
