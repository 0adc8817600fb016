"""The API server as a stranger meets it: who may ask, what is refused, and what happens when the database is away."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import anyio
import psutil
import psycopg
import pytest

from cluster import api_server
from cluster.postgres import EmbeddedPostgres
from orchestrator.api import routes
from orchestrator.api.routes import Questions, application
from orchestrator.backends import postgres as server_of
from orchestrator.backends.postgres import conninfo
from orchestrator.catalog import remote, wire
from orchestrator.errors import NotFound, ServiceUnavailable
from orchestrator.records import RunSpec, RunStatus
from orchestrator.stack import Stack
from orchestrator.store import migrate
from orchestrator.store.store import Store
from orchestrator.sweep_records import SweepSpec
from tests.plugins.api_server import client, serving
from tests.plugins.runs import wait_until

RAY_TOKEN = "r" * 64
CANARY = "s3cret-canary"
ORC = Path(sys.executable).with_name("orc")


@pytest.fixture(scope="module")
def stack(schema_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """With a sweep and a run whose storage URL has a password, and an API server."""
    home = tmp_path_factory.mktemp("home")
    store = Store(schema_url, pool_size=1)
    ticket = store.open_attempt(
        RunSpec(experiment="digits", name="brave-otter", storage_url=str(home / "runs")), now=1e9, lease_seconds=1e6
    )
    store.open_sweep(SweepSpec(sweep=ticket.run), "me")
    logs = Path(ticket.directory) / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    (logs / "rank-0.log").write_text("hello from 0\n")
    secret = RunSpec(experiment="remote", name="far-heron", storage_url=f"s3://key:{CANARY}@bucket/runs")
    store.open_attempt(secret, now=1e9, lease_seconds=1e6)
    store.close()
    with serving(Stack(home=str(home), database_url=schema_url)) as stack:
        yield stack


def token(stack: Stack) -> str:
    return Path(stack.api_token_path).read_text()


def ask(
    stack: Stack, path: str, *, method: str = "GET", bearer: str | None = None
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body, asked with the stack's own token unless another one is given; "" sends none."""
    sent = token(stack) if bearer is None else bearer
    connection = http.client.HTTPConnection(urlsplit(stack.api_url).netloc, timeout=30)
    connection.request(method, path, headers={"Authorization": f"Bearer {sent}"} if sent else {})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, response.headers, body


def every_route(run: str = "a-run") -> list[str]:
    """One address of each route there is."""
    (mount,) = application(Path("/nowhere"), "postgresql://nobody@127.0.0.1:1/none", "").routes
    paths = [f"/api/v1{route.path}" for route in mount.routes]  # type: ignore[attr-defined]
    values = {"{run}": run, "{attempt:int}": "1", "{source}": "driver", "{sweep}": run}
    for name, value in values.items():
        paths = [path.replace(name, value) for path in paths]
    return paths


@pytest.mark.parametrize("path", [*every_route(), "/", "/api/v1/nonsense", "/docs", "/openapi.json"])
@pytest.mark.parametrize("bearer", ["", "wrong", RAY_TOKEN])
def test_nothing_but_the_health_is_told_without_a_token(stack: Stack, path: str, bearer: str) -> None:
    status, headers, body = ask(stack, path, bearer=bearer)
    if path == "/api/v1/health":
        assert (status, set(json.loads(body))) == (200, {"ok", "version"})
    else:
        assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
        assert set(json.loads(body)) == {"error"}


def test_every_route_answers_with_the_token(stack: Stack) -> None:
    run = client(stack).run("brave-otter").run
    parameters = {
        "/api/v1/run": "?reference=last", "/api/v1/sweep": "?reference=last", f"/api/v1/runs/{run}/points": "?key=loss",
        f"/api/v1/runs/{run}/points_of": "?key=loss&key=none",
    }  # fmt: skip
    for path in every_route(run):
        status, headers, _ = ask(stack, path.replace("driver", "rank-0") + parameters.get(path, ""))
        assert (path, status) == (path, 200)
        assert headers["Cache-Control"] == "no-store"
        assert "server" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
@pytest.mark.parametrize("path", ["/api/v1/runs", "/api/v1/health", "/api/v1/runs/x/logs/1/driver"])
def test_everything_but_reading_is_refused(stack: Stack, method: str, path: str) -> None:
    status, headers, _ = ask(stack, path, method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_head_gives_the_head_only(stack: Stack) -> None:
    for path in ("/api/v1/runs", "/api/v1/health"):
        status, headers, body = ask(stack, path, method="HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 0


def test_the_token_is_for_its_owner_only_and_long(stack: Stack) -> None:
    assert stat.S_IMODE(Path(stack.api_token_path).stat().st_mode) == 0o600
    assert len(token(stack)) == 64


def test_a_replaced_token_is_refused_at_once(stack: Stack) -> None:
    old, fresh = token(stack), "f" * 64
    try:
        Path(stack.api_token_path).write_text(fresh)
        assert ask(stack, "/api/v1/runs", bearer=old)[0] == 401
        assert ask(stack, "/api/v1/runs", bearer=fresh)[0] == 200
        Path(stack.api_token_path).write_text("")
        for nothing in ("", " ", "Bearer"):
            assert ask(stack, "/api/v1/runs", bearer=nothing)[0] == 401
    finally:
        Path(stack.api_token_path).write_text(old)


def test_rays_token_counts_only_where_the_head_is_ours(stack: Stack, tmp_path: Path) -> None:
    file = tmp_path / "ray_token"
    file.write_text(RAY_TOKEN)
    assert ask(stack, "/api/v1/runs", bearer=RAY_TOKEN)[0] == 401
    try:
        replace(stack, ray_token_path=str(file)).save()
        assert ask(stack, "/api/v1/runs", bearer=RAY_TOKEN)[0] == 200
    finally:
        stack.save()
    assert ask(stack, "/api/v1/runs", bearer=RAY_TOKEN)[0] == 401


def test_the_server_listens_on_loopback_only(stack: Stack) -> None:
    process = psutil.Process(stack.processes["api"]["pid"])
    listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]


def test_the_database_session_cannot_write(stack: Stack) -> None:
    store = Questions(stack.database_url, "")._store
    try:
        with pytest.raises(ServiceUnavailable, match="read-only"):
            store.open_attempt(RunSpec(experiment="x"), now=1e9, lease_seconds=1)
    finally:
        store.close()


@pytest.mark.parametrize(
    "path",
    [
        "/api/v1/runs?limit=5001", "/api/v1/runs?limit=-1", "/api/v1/runs?limit=x", "/api/v1/runs?offset=1e3",
        "/api/v1/runs?limit=99999999999999999999999", "/api/v1/runs?status=happy", "/api/v1/run?reference=%00",
        "/api/v1/runs/x/events?newest=1001", "/api/v1/summaries?" + "&".join(["run=x"] * 501),
        "/api/v1/runs?tag=a%2500=b", "/api/v1/runs/x%00/notes", "/api/v1/runs/x/points?key=loss&rank=-1",
        "/api/v1/runs/x/live?wait_ms=5001", "/api/v1/runs/x/live?wait_ms=soon",
        "/api/v1/runs/x/curve?key=loss&start=1e3", "/api/v1/runs/x/curve?key=loss&stop=99999999999999999999",
        "/api/v1/runs/x/curve?key=loss&most=100001", "/api/v1/runs/x/curve?key=loss&start=--1",
        "/api/v1/runs/x/points_of", "/api/v1/runs/x/points_of?" + "&".join(["key=x"] * 501),
    ],
)  # fmt: skip
def test_a_page_has_an_end_and_a_senseless_question_is_the_askers_mistake(stack: Stack, path: str) -> None:
    status, _, body = ask(stack, path)
    assert status == 400
    assert json.loads(body)["error"]["type"] == "BadQuestion"


@pytest.mark.parametrize(
    "name", ["..%2f..%2f..%2fapi_token", "%2e%2e", "rank-0%2f..%2f..%2fconfig", "rank-0.log", "config", "rank-0%0a"]
)
def test_no_file_but_a_log_is_read(stack: Stack, name: str) -> None:
    run = client(stack).run("brave-otter").run
    (Path(client(stack).run(run).directory) / "config.json").write_text(CANARY)
    status, _, body = ask(stack, f"/api/v1/runs/{run}/logs/1/{name}")
    assert status == 404
    assert CANARY not in body.decode()
    assert token(stack) not in body.decode()
    assert ask(stack, f"/api/v1/runs/{run}/logs/..%2f..%2f1/rank-0")[0] == 404


def test_no_password_is_told(stack: Stack) -> None:
    assert client(stack).run("far-heron").directory.startswith("s3://key:***@bucket/runs")
    for path in ("/api/v1/run?reference=far-heron", "/api/v1/runs", "/api/v1/server", "/api/v1/experiments"):
        assert CANARY not in ask(stack, path)[2].decode()


def test_a_reader_who_leaves_in_mid_answer_gives_the_connection_back(stack: Stack) -> None:
    """More of them than the server has connections."""
    run = client(stack).run("brave-otter").run
    where = urlsplit(stack.api_url)
    for _ in range(12):
        with socket.create_connection((where.hostname, where.port), timeout=10) as connection:
            asked = (
                f"GET /api/v1/runs/{run}/points?key=loss HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token(stack)}"
            )
            connection.sendall(f"{asked}\r\n\r\n".encode())
    asked_at = time.monotonic()
    assert len(client(stack).points(run, "loss")) == 0
    assert time.monotonic() - asked_at < 8, "a lost connection is waited for ten seconds"


def test_a_reader_who_takes_nothing_gives_the_connection_back(
    stack: Stack, schema_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other end of the wire is the only thing here that is not real: it is there and never reads."""
    monkeypatch.setattr(routes, "PATIENCE", 0.05)
    store = Store(schema_url, pool_size=1)
    run = client(stack).run("brave-otter").run
    is_begun = False

    async def send(message: Any) -> None:
        nonlocal is_begun
        is_begun = True
        await anyio.sleep_forever()

    async def receive() -> Any:
        await anyio.sleep_forever()

    async def answer() -> None:
        with anyio.fail_after(30):
            scope = {"type": "http", "method": "GET", "path": "/points", "asgi": {"spec_version": "2.3"}}
            await routes.Stream(wire.blocks(store.point_blocks(run, "loss")), wire.ARROW)(scope, receive, send)

    try:
        anyio.run(answer)
        assert is_begun
        assert store._engine.pool.checkedout() == 0  # type: ignore[attr-defined]
    finally:
        store.close()


def test_a_log_is_read_behind_two_gigabytes(stack: Stack) -> None:
    run = client(stack).run("brave-otter")
    log, offset = Path(run.directory) / "logs" / "attempt-1" / "rank-7.log", 3 << 30
    with log.open("wb") as file:  # a hole takes no room
        file.seek(offset)
        file.write(b"the end\n")
    try:
        assert client(stack).logs(run.run).read(1, "rank-7", offset, 100) == b"the end\n"
    finally:
        log.unlink()
    assert ask(stack, f"/api/v1/runs/{run.run}/events?newest=1&before={2**40}")[0] == 200


def test_another_server_on_the_port_is_not_taken_for_ours(tmp_path: Path, schema_url: str) -> None:
    """It answers at once, while ours has not even found out that the port is taken."""
    Stack(home=str(tmp_path), database_url=schema_url).save()
    api_server.ensure_token(tmp_path)
    with Answering(b'{"ok": true}') as port, pytest.raises(ServiceUnavailable, match="address already in use"):
        api_server.start(tmp_path, "127.0.0.1", port)


def test_the_token_is_not_sent_to_whoever_has_the_port_and_the_number_of_a_dead_server(tmp_path: Path) -> None:
    """As after a reboot: this very process has its number now."""
    token_path = api_server.ensure_token(tmp_path)
    with Answering(b"{}") as port:
        stack = Stack(
            home=str(tmp_path), api_url=f"http://127.0.0.1:{port}", api_token_path=str(token_path),
            processes={"api": {"pid": os.getpid()}},
        )  # fmt: skip
        assert remote.living_server(stack) is None
        assert Answering.asked == []


class Answering:
    """Some HTTP server that says the same to everything; gives its port. `asked` has the headers of each question."""

    asked: ClassVar[list[str]] = []

    def __init__(self, body: bytes) -> None:
        type(self).asked = asked = []

        class Always(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(str(self.headers))
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Always)

    def __enter__(self) -> int:
        threading.Thread(target=self._server.serve_forever, args=(0.05,)).start()
        return int(self._server.server_address[1])

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.mark.parametrize("body", [b"[]", b'"ok"', b"1", b"null", b"{}"])
def test_a_server_that_says_something_else_is_none_of_ours(body: bytes) -> None:
    with Answering(body) as port, pytest.raises(ServiceUnavailable):
        remote.HttpCatalog(f"http://127.0.0.1:{port}", "t").check()


def test_the_database_may_go_and_come_back(tmp_path: Path) -> None:
    directory = Path(tempfile.mkdtemp(prefix="orct-"))
    directory.chmod(0o711)
    server = EmbeddedPostgres(directory / "pg")
    try:
        server.start()
        server.ensure_database("orc")
        migrate.upgrade(server.url("orc"))
        with serving(Stack(home=str(tmp_path), database_url=server.url("orc"))) as stack:
            pid = stack.processes["api"]["pid"]
            assert client(stack).runs() == []
            server.stop()
            status, _, body = ask(stack, "/api/v1/runs")
            assert status == 503
            assert "postgresql at" in json.loads(body)["error"]["message"]
            with pytest.raises(ServiceUnavailable) as refused:
                client(stack).runs()
            assert refused.value.service == "postgresql"
            assert ask(stack, "/api/v1/health", bearer="")[0] == 200
            server.start()
            assert client(stack).runs() == []
            assert psutil.pid_exists(pid)
    finally:
        server.stop()
        shutil.rmtree(directory)


def test_a_database_without_our_schema_says_what_to_do(database_url: str, tmp_path: Path) -> None:
    with serving(Stack(home=str(tmp_path), database_url=database_url)) as stack:
        status, _, body = ask(stack, "/api/v1/runs")
        assert (status, "orc db upgrade" in json.loads(body)["error"]["message"]) == (503, True)
        migrate.upgrade(database_url)
        assert client(stack).runs() == []


def test_a_defect_is_told_without_its_inside(schema_url: str, tmp_path: Path) -> None:
    """A table that is not what the code expects, although the schema says so."""
    name = f"{server_of.database_of(schema_url)}_broken"
    url = server_of.with_database(schema_url, name)
    server_of.ensure_database(server_of.with_database(schema_url, "postgres"), name)
    try:
        migrate.upgrade(url)
        with psycopg.connect(conninfo(url)) as connection:
            connection.execute("ALTER TABLE experiments ALTER name TYPE integer USING 1")
        with serving(Stack(home=str(tmp_path), database_url=url)) as stack:
            status, _, body = ask(stack, "/api/v1/runs?experiment=digits")
            assert status == 500
            assert "SELECT" not in body.decode()
            log = tmp_path / "logs" / "api.log"
            wait_until(lambda: "Traceback" in log.read_text(), 10, "the log has the traceback")
    finally:
        server_of.drop_database(server_of.with_database(schema_url, "postgres"), name)


# -- `orc` on another host ---------------------------------------------------------------------------------------------


def elsewhere(tmp_path: Path, **more: str) -> dict[str, str]:
    """The environment of a laptop: an empty home directory, no stack."""
    (tmp_path / "laptop").mkdir(exist_ok=True)
    return {"HOME": str(tmp_path / "laptop"), "PATH": os.defpath, **more}


def orc(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ORC, *words], env=env, cwd=env["HOME"], capture_output=True, text=True, timeout=60)


def answer(*words: str, env: dict[str, str]) -> Any:
    done = orc(*words, "--json", env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_orc_reads_from_another_host_without_a_stack(stack: Stack, tmp_path: Path) -> None:
    copy = tmp_path / "copied_token"
    copy.write_text(token(stack) + "\n")
    env = elsewhere(tmp_path, ORC_API_TOKEN_PATH=str(copy))
    api = ("--api", stack.api_url)
    assert [row["name"] for row in answer("ls", *api, env=env)] == ["far-heron", "brave-otter"]
    assert [row["name"] for row in answer("experiments", *api, env=env)] == ["remote", "digits"]
    story = answer("show", "brave-otter", *api, env=env)
    assert story["name"] == "brave-otter"
    assert "ray_dashboard" not in story["links"]
    assert answer("metrics", "brave-otter", *api, env=env)["metrics"] == []
    env |= {"ORC_API_URL": stack.api_url}
    done = orc("logs", "brave-otter", "--rank", "0", env=env)
    assert (done.stdout, done.stderr) == ("hello from 0\n", "")
    assert not (tmp_path / "laptop" / ".orc").exists()


def test_orc_follows_the_logs_of_another_host_until_the_run_ends(stack: Stack, tmp_path: Path) -> None:
    store = Store(stack.database_url, pool_size=1)
    storage = str(Path(stack.home) / "runs")
    ticket = store.open_attempt(RunSpec(experiment="digits", storage_url=storage), now=time.time(), lease_seconds=1e6)
    logs = Path(ticket.directory) / "logs" / "attempt-1"
    logs.mkdir(parents=True)
    env = elsewhere(tmp_path, ORC_API_URL=stack.api_url, ORC_API_TOKEN=token(stack))
    words = [str(ORC), "logs", ticket.run, "--follow", "--rank", "0"]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as follower:
        try:
            assert follower.stdout
            with (logs / "rank-0.log").open("w", buffering=1) as log:
                for line in ("first", "second"):
                    log.write(f"{line}\n")
                    assert follower.stdout.readline() == f"{line}\n"
            store.transition(ticket.run, 1, RunStatus.finished, now=time.time())
            assert follower.wait(timeout=30) == 0
        finally:
            follower.kill()
            store.close()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "There is no token for the API server"),
        ({"ORC_API_TOKEN": "wrong"}, "it refuses the token in ORC_API_TOKEN."),
        ({"RAY_AUTH_TOKEN": "wrong"}, "it refuses the token in RAY_AUTH_TOKEN."),
        ({"ORC_API_TOKEN_PATH": "/no/such/file"}, "ORC_API_TOKEN_PATH names no file"),
        ({"ORC_API_TOKEN": "a\nb"}, "characters that no token has"),
    ],
)
def test_a_wrong_token_names_its_variable(stack: Stack, tmp_path: Path, variables: dict[str, str], said: str) -> None:
    done = orc("ls", "--api", stack.api_url, env=elsewhere(tmp_path, **variables))
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert "wrong" not in done.stderr


def test_an_address_where_nobody_or_somebody_else_is(tmp_path: Path) -> None:
    env = elsewhere(tmp_path, ORC_API_TOKEN="t")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        done = orc("ls", "--api", f"http://127.0.0.1:{port}", env=env)
        assert (done.returncode, "Connection refused" in done.stderr) == (2, True), done.stderr
    for nonsense in ("ftp://host", "http://", "http://h:99999", "http://[::1"):
        done = orc("ls", "--api", nonsense, env=env)
        assert (done.returncode, "is no address" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("words", [["ls"], ["ls", "--json"], ["show", "brave-otter"], ["experiments"], ["metrics"]])
def test_looking_through_the_api_loads_nothing_heavy(stack: Stack, words: list[str]) -> None:
    """Why `orc ls` is fast: importing any of these takes longer than the whole command."""
    code = (
        "import sys; from orchestrator.cli.main import main; code = main();"
        "print(code, *sorted({n.partition('.')[0] for n in sys.modules}), file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "--home", stack.home, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    code_and_modules = done.stderr.split()
    assert code_and_modules[0] == "0", done.stderr
    heavy = {"numpy", "psycopg", "sqlalchemy", "pyarrow", "ray", "torch", "mlflow", "rich", "starlette", "psutil"}
    assert heavy & set(code_and_modules) == set()
    assert "http" in code_and_modules


def test_points_and_unknown_runs_come_through_the_same_errors(stack: Stack) -> None:
    with pytest.raises(NotFound) as refused:
        client(stack).run("brave-oter")
    assert refused.value.nearest[0] == "brave-otter"  # runs of other tests, whose names are drawn, may be near, too
    assert client(stack).url == stack.api_url
    assert ask(stack, f"/api/v{wire.VERSION}/server")[0] == 200
