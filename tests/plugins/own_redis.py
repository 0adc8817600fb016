"""A real Redis for one test, started as `orc up` starts it; killed, frozen, emptied and filled as it is needed."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from cluster import redis_server
from tests.plugins.runs import wait_until


class OwnRedis:
    def __init__(self, memory: str = redis_server.MEMORY) -> None:
        self.memory = memory
        self.home = Path(tempfile.mkdtemp(prefix="orct-"))  # short: a socket lives in it
        self.home.chmod(0o711)  # as root the server runs as `nobody`, who must pass through
        self.start()

    def start(self) -> None:
        self.process, self.url = redis_server.start(self.home, self.memory)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def freeze(self) -> None:
        self.process.suspend()
        wait_until(lambda: self.process.status() == psutil.STATUS_STOPPED, 10, "Redis stands still")

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def client(self) -> redis.Redis:
        return redis.Redis(
            unix_socket_path=str(self.home / "redis" / "s" / "socket"), username=redis_server.USER,
            password=(self.home / "redis" / "password").read_text(), protocol=2,
        )  # fmt: skip

    def empty(self) -> None:
        """As FLUSHALL, which our user may not say."""
        client = self.client()
        for key in client.scan_iter():
            client.unlink(key)
        assert list(client.scan_iter()) == []


@contextmanager
def own_redis(memory: str = redis_server.MEMORY) -> Iterator[OwnRedis]:
    if redis_server.program() is None:
        pytest.skip("there is no redis-server here")
    server = OwnRedis(memory)
    try:
        yield server
    finally:
        redis_server.stop(server.home)
        shutil.rmtree(server.home)
