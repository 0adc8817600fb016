"""Live values in Redis: written by the tracker, read by whoever watches. Redis may lose all of it at any time.

| key | what |
|---|---|
| `orc:run:<id>` | hash: `state`, `checkpoints` and, per rank and key, `value:<rank>:<key>`; all JSON |
| `orc:run:<id>:changes` | capped stream; entries with `state`, `values` (a list) and, if they changed, `checkpoints` |
| `orc:sweep:<id>` | hash: the state of each of its runs |
| `orc:sweep:<id>:changes` | capped stream; the entries of its runs, with `run` |
| `orc:watched:<id>` | there as long as somebody follows the run |
| `orc:publisher:<token>` | there as long as Redis has what that tracker wrote |

Everything has a TTL. JSON is as in `orchestrator/live_records.py`; what is no such JSON is left out when it is read.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from orchestrator.config.redaction import redact_url
from orchestrator.errors import ServiceUnavailable
from orchestrator.live_records import (
    LiveCheckpoint,
    LiveRun,
    LiveState,
    LiveValue,
    checkpoints_from,
    loaded,
    state_document,
    state_from,
    value_json,
    values_from,
)

if TYPE_CHECKING:
    from orchestrator.tracking.live import LiveChange

TTL = 24 * 3600
TIMEOUT = 0.5
"""Seconds in which it answers or counts as away."""
WATCHED = 5
"""Seconds for which a run counts as followed after a question for its changes."""
SLICE = 1.0
"""Seconds that one question for changes waits in Redis; a server that hangs is noticed after that."""
CHANGES = 1_000
"""Entries that a run's stream keeps; fewer if they are large."""
CHANGES_BYTES = 1 << 20
SWEEP_CHANGES = 10_000
READ_AT_ONCE = 200
PASSWORD_FILE = "password_file"
"""Parameter of a URL: the file that has the password."""


def socket_url(socket: Path, user: str, password_file: Path) -> str:
    """The address of a server of our own; has no secret in it."""
    return f"unix://{user}@{quote(str(socket))}?{PASSWORD_FILE}={quote(str(password_file), safe='')}"


def probe(url: str, timeout: float = 2.0) -> tuple[str, float]:
    """The server's version, and in how many milliseconds it answered. Raises ServiceUnavailable."""
    import time

    client = _client(url, timeout)
    try:
        client.ping()
        asked = time.perf_counter()
        told = client.execute_command("HELLO")
        took = (time.perf_counter() - asked) * 1000
    except redis.RedisError as error:
        raise _unavailable(url, error) from error
    finally:
        client.close()
    pairs = told if isinstance(told, dict) else dict(zip(told[::2], told[1::2], strict=False))
    return (pairs.get(b"version") or b"").decode(), took


class LiveRedis:
    """One server. Writes and reads may come from several threads. Connects when first used; every call answers within
    `TIMEOUT` or raises ServiceUnavailable; only `changes` waits longer, if it is told to.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = _client(url, TIMEOUT)
        self._waiting = _client(url, SLICE + TIMEOUT)
        self._writing = threading.Lock()

    def close(self) -> None:
        self._client.close()
        self._waiting.close()

    # -- the tracker

    def write(self, changes: Sequence[LiveChange], token: str) -> bool:
        """Writes all of it in one go. False when what was written before under this token is lost."""
        mark = f"orc:publisher:{token}"
        commands = [_packed("GET", mark)]
        if changes:
            commands.append(_packed("SET", mark, "1", "EX", TTL))
        for change in changes:
            commands += _change_commands(change)
        with self._writing:
            answers = self._sent(commands)
        return answers[0] is not None

    def recall(self, runs: Sequence[str]) -> dict[str, LiveState]:
        """What was last written of these runs, by this tracker or the one before it."""
        with self._writing:
            answers = self._sent([_packed("HGET", _run_key(run), "state") for run in runs])
        states = ((run, state_from(loaded(answer))) for run, answer in zip(runs, answers, strict=True))
        return {run: state for run, state in states if state is not None}

    def watched(self, runs: Sequence[str]) -> frozenset[str]:
        """Those that somebody follows."""
        if not runs:
            return frozenset()
        with self._writing:
            answers = self._sent([_packed("EXISTS", _watched_key(run)) for run in runs])
        return frozenset(run for run, answer in zip(runs, answers, strict=True) if answer)

    def _sent(self, commands: Sequence[bytes]) -> list[Any]:
        answers = self._answers(commands)
        for answer in answers:
            if isinstance(answer, redis.RedisError):
                raise _unavailable(self._url, answer)
        return answers

    def _answers(self, commands: Sequence[bytes]) -> list[Any]:
        """What is said to each command, errors among it. redis-py's own pipeline takes several times as long."""
        try:
            connection = self._client.connection_pool.get_connection()
            try:
                connection.send_packed_command([b"".join(commands)])
                return [_answer(connection) for _ in commands]
            except BaseException:
                connection.disconnect()  # what it still has to say belongs to nobody
                raise
            finally:
                self._client.connection_pool.release(connection)
        except (redis.RedisError, OSError) as error:
            raise _unavailable(self._url, error) from error

    # -- watchers

    def read(self, run: str) -> LiveRun | None:
        """The newest of a run; None when Redis does not know it."""
        # The cursor first: what comes between the two is told twice, never missed.
        newest, flat = self._asked(("XREVRANGE", _changes_key(run), "+", "-", "COUNT", 1), ("HGETALL", _run_key(run)))
        raw = dict(zip(flat[::2], flat[1::2], strict=True)) if flat else {}
        state = state_from(loaded(raw.get(b"state")))
        if state is None:
            return None
        return LiveRun(
            run=run, state=state, source="redis",
            values=values_from([loaded(text) for name, text in raw.items() if name.startswith(b"value:")]),
            checkpoints=checkpoints_from(loaded(raw.get(b"checkpoints"))), cursor=_cursor(newest),
        )  # fmt: skip

    def changes(self, run: str, cursor: str, wait: float) -> LiveRun | None:
        """What changed after `cursor`; waits for it at most `wait` seconds. None when Redis does not know the run."""
        entries: list[Any] = []
        while True:
            self._asked(("SET", _watched_key(run), 1, "EX", WATCHED))
            span = min(wait, SLICE)
            words = ["COUNT", READ_AT_ONCE, *(["BLOCK", max(1, int(span * 1000))] if span > 0 else [])]
            entries = self._read_stream(words, run, cursor)
            wait -= span
            if entries or wait <= 0:
                break
        if not entries:
            (raw,) = self._asked(("HGET", _run_key(run), "state"))
            state = state_from(loaded(raw))
            if state is None:
                return None
            return LiveRun(run=run, state=state, values=(), checkpoints=(), source="redis", cursor=cursor)
        return _merged(run, entries)

    def _read_stream(self, words: Sequence[Any], run: str, cursor: str) -> list[Any]:
        try:
            found = self._waiting.execute_command("XREAD", *words, "STREAMS", _changes_key(run), cursor)
        except redis.ResponseError:
            return []  # no cursor, or no stream: somebody else wrote there
        except (redis.RedisError, OSError) as error:
            raise _unavailable(self._url, error) from error
        streams = found.values() if isinstance(found, dict) else [each[1] for each in found or []]
        return [entry for stream in streams for entry in _flat(stream)]

    def _asked(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The answers; None where somebody else keeps something of another kind under that name."""
        answers = self._answers([_packed(*command) for command in commands])
        for answer in answers:
            if isinstance(answer, redis.RedisError) and not str(answer).startswith("WRONGTYPE"):
                raise _unavailable(self._url, answer)
        return [None if isinstance(answer, redis.RedisError) else answer for answer in answers]


def _run_key(run: str) -> str:
    return f"orc:run:{run}"


def _watched_key(run: str) -> str:
    return f"orc:watched:{run}"


def _changes_key(run: str) -> str:
    return f"orc:run:{run}:changes"


def _change_commands(change: LiveChange) -> list[bytes]:
    key, stream = _run_key(change.run), _changes_key(change.run)
    state = json.dumps(state_document(change.state), allow_nan=False)
    shown = [value_json(*value) for value in change.values]
    fields = ["state", state]
    for (name, rank, *_), text in zip(change.values, shown, strict=True):
        fields += (f"value:{rank}:{name}", text)
    entry = ["state", state, "values", f"[{','.join(shown)}]"]
    if change.checkpoints is not None:
        checkpoints = json.dumps([asdict(checkpoint) for checkpoint in change.checkpoints])
        fields += ("checkpoints", checkpoints)
        entry += ("checkpoints", checkpoints)
    size = sum(map(len, entry))
    commands = [
        _packed("HSET", key, *fields),
        _packed("XADD", stream, "MAXLEN", "~", max(10, min(CHANGES, CHANGES_BYTES // size)), "*", *entry),
    ]
    kept = [key, stream]
    if change.state.sweep:
        sweep = f"orc:sweep:{change.state.sweep}"
        most = max(100, min(SWEEP_CHANGES, 10 * CHANGES_BYTES // size))
        commands += [
            _packed("HSET", sweep, change.run, state),
            _packed("XADD", f"{sweep}:changes", "MAXLEN", "~", most, "*", "run", change.run, *entry),
        ]
        kept += [sweep, f"{sweep}:changes"]
    return commands + [_packed("EXPIRE", each, TTL) for each in kept]


def _packed(*words: str | int) -> bytes:
    """One command as it travels."""
    encoded = [str(word).encode("utf-8", "replace") for word in words]
    return b"*%d\r\n" % len(encoded) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded])


def _answer(connection: Any) -> Any:
    try:
        return connection.read_response()
    except redis.ResponseError as error:
        return error


def _flat(stream: Any) -> Iterable[Any]:
    """Entries (id, fields); newer protocols put them one level deeper."""
    return stream[0] if stream and isinstance(stream[0], list) and stream[0] and _is_entry(stream[0][0]) else stream


def _is_entry(thing: Any) -> bool:
    return isinstance(thing, list | tuple) and len(thing) == 2 and isinstance(thing[0], bytes)


def _cursor(newest: Any) -> str:
    return newest[0][0].decode() if newest and _is_entry(newest[0]) else "0-0"


def _merged(run: str, entries: Sequence[Any]) -> LiveRun | None:
    """Several entries as one; of each series every value stays, oldest first: watchers draw them."""
    state: LiveState | None = None
    values: list[LiveValue] = []
    checkpoints: tuple[LiveCheckpoint, ...] = ()
    for _, fields in entries:
        said = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=False))
        state = state_from(loaded(said.get(b"state"))) or state
        values += values_from(loaded(said.get(b"values")))
        checkpoints = checkpoints_from(loaded(said.get(b"checkpoints"))) or checkpoints
    if state is None:
        return None
    last = entries[-1][0].decode()
    return LiveRun(
        run=run, state=state, values=tuple(values), checkpoints=checkpoints, source="redis", cursor=last
    )  # fmt: skip


def _client(url: str, timeout: float) -> redis.Redis:
    parts = urlsplit(url)
    named = parse_qs(parts.query)
    secrets = {}
    if PASSWORD_FILE in named:
        try:
            secrets["password"] = Path(named.pop(PASSWORD_FILE)[0]).read_text().strip()
        except OSError as error:
            raise _unavailable(url, error) from error
        url = urlunsplit(parts._replace(query="&".join(f"{k}={quote(v)}" for k, each in named.items() for v in each)))
    try:
        return redis.Redis.from_url(
            url, socket_timeout=timeout, socket_connect_timeout=timeout, retry=Retry(NoBackoff(), 0), protocol=2,
            health_check_interval=0, **secrets,
        )  # fmt: skip
    except ValueError as error:
        raise _unavailable(url, error) from error


def address(url: str) -> str:
    """Where it is, for people."""
    parts = urlsplit(url)
    return f"socket {parts.path}" if parts.scheme == "unix" else redact_url(url)


def _unavailable(url: str, error: Exception) -> ServiceUnavailable:
    why = str(error).split("\n")[0] or type(error).__name__
    return ServiceUnavailable("redis", address(url), f"{why.rstrip('.')}.", "`orc up` starts ours; see `orc doctor`.")
