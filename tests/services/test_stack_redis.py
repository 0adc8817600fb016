"""Redis as a part of the stack: started, kept, mended, told of, left out; Ray and MLflow are switched off here."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster import redis_server, stack_doctor, stack_down, stack_status, stack_up
from cluster.progress import Progress
from orchestrator.errors import ConfigError, ServiceUnavailable
from orchestrator.stack import Stack, StackSettings
from tests.plugins.own_redis import OwnRedis, own_redis
from tests.services.test_stack_up import belonging_to

PASSWORD = "s3cret-canary"


def up(home: Path, database_url: str, *words: str) -> tuple[Stack, str]:
    """The stack, and what was said meanwhile."""
    said = io.StringIO()
    settings = ["ray.enabled=false", "mlflow.enabled=false", "api.enabled=false", f"database.url={database_url}"]
    stack = stack_up.up(home, StackSettings.parse([*settings, *words]), Progress(said))
    return stack, said.getvalue()


def part(stack: Stack) -> stack_status.Part:
    (found,) = stack_status.redis(stack)
    return found


def finding(stack: Stack) -> stack_doctor.Finding:
    return next(f for f in stack_doctor._redis(Path(stack.home), stack) if f.check == "Redis")


@pytest.fixture
def home() -> Iterator[Path]:
    """Stopped at the end, which leaves no process."""
    parent = Path(tempfile.mkdtemp(prefix="orct-"))  # short: a socket lives in it
    parent.chmod(0o711)
    try:
        yield parent / "h"
    finally:
        stack_down.down(parent / "h", Progress(quiet=True))
        left = belonging_to(parent / "h")
        shutil.rmtree(parent)
    assert left == []


@pytest.fixture
def server() -> Iterator[OwnRedis]:
    with own_redis() as server:
        yield server


needs_a_server = pytest.mark.skipif(redis_server.program() is None, reason="there is no redis-server here")


@needs_a_server
def test_it_is_started_once_mended_when_it_died_or_stands_still_and_stopped(home: Path, schema_url: str) -> None:
    first, _ = up(home, schema_url)
    assert part(first).status == "up"
    assert part(first).version.startswith(("6.", "7.", "8."))
    assert finding(first).is_ok
    again, _ = up(home, schema_url)
    assert again.processes["redis"] == first.processes["redis"]
    (process,) = redis_server.leftovers(home)
    process.kill()
    process.wait(10)
    assert part(first).status == "down"
    assert "orc up" in part(first).why
    assert not finding(first).is_ok
    mended, _ = up(home, schema_url)
    (process,) = redis_server.leftovers(home)
    process.suspend()
    assert part(mended).status == "down"
    thawed, _ = up(home, schema_url)
    assert (part(thawed).status, thawed.redis_url) == ("up", first.redis_url)
    secret = (home / "redis" / "password").read_text()
    assert secret not in (home / "stack.json").read_text() + json.dumps(asdict(part(thawed)))
    assert "Redis" in stack_down.down(home, Progress(quiet=True))
    assert redis_server.leftovers(home) == []


@needs_a_server
def test_it_is_stopped_when_it_is_not_wanted_any_more(home: Path, schema_url: str) -> None:
    up(home, schema_url)
    stack, said = up(home, schema_url, "redis.enabled=false")
    assert (stack.redis_url, part(stack).status, redis_server.leftovers(home)) == ("", "off", [])
    assert "Redis" not in said


def test_where_there_is_none_one_line_says_so(home: Path, schema_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server, "program", lambda: None)
    stack, said = up(home, schema_url)
    assert (stack.redis_url, said.count("Redis")) == ("", 1)
    assert finding(stack).is_ok
    with pytest.raises(ConfigError, match="no redis-server"):
        up(home, schema_url, "redis.enabled=true")


def test_one_that_does_not_start_is_no_reason_to_fail_unless_it_must_be_there(
    home: Path, schema_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_server, "program", lambda: Path("/bin/false"))
    stack, said = up(home, schema_url)
    assert (stack.redis_url, said.count("Redis ")) == ("", 1)
    with pytest.raises(ServiceUnavailable, match="redis"):
        up(home, schema_url, "redis.enabled=true")


@needs_a_server
def test_somebody_elses_is_used_and_remembered(home: Path, schema_url: str, server: OwnRedis) -> None:
    stack, _ = up(home, schema_url, f"redis.url={server.url}")
    assert (stack.redis_url, redis_server.leftovers(home)) == (server.url, [])
    again, _ = up(home, schema_url)
    assert again.redis_url == server.url
    own, _ = up(home, schema_url, "redis.url=embedded")
    assert own.redis_url != server.url
    assert part(own).status == "up"


def test_a_password_in_its_address_is_not_told(home: Path, schema_url: str) -> None:
    url = f"rediss://orc:{PASSWORD}@127.0.0.1:1/0"
    with pytest.raises(ServiceUnavailable) as told:
        up(home, schema_url, f"redis.url={url}")
    assert PASSWORD not in str(told.value)
    assert "127.0.0.1:1" in str(told.value)
    stack = Stack(home=str(home), redis_url=url)
    assert PASSWORD not in repr(stack) + json.dumps(asdict(part(stack)))
    with pytest.raises(ConfigError) as refused:
        StackSettings.parse([f"redis.url=http://orc:{PASSWORD}@host"])
    assert PASSWORD not in str(refused.value)
