"""A question over HTTP to one of our own servers: no proxy, no redirect, one short wait."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back; `status` 0 means that nothing did, and `body` then tells why."""

    status: int
    body: str
    latency_ms: float

    @property
    def ok(self) -> bool:
        return self.status == 200

    def json(self) -> Any:
        """The body's value, {} if it is none."""
        try:
            return json.loads(self.body)
        except ValueError:
            return {}


def get(url: str, *, token: str = "", timeout: float = 5) -> Answer:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    asked = time.perf_counter()
    connection = kind(parts.hostname or "", parts.port, timeout=timeout)
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=headers)
        response = connection.getresponse()
        body = response.read(4 * 2**20).decode(errors="replace")
        return Answer(response.status, body, (time.perf_counter() - asked) * 1000)
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Answer(0, why, (time.perf_counter() - asked) * 1000)
    finally:
        connection.close()
