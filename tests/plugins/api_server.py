"""A real API server for whoever asks: a process of its own, on a data directory of its own, without `orc up`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cluster import api_server, ports, processes
from orchestrator.catalog.remote import HttpCatalog
from orchestrator.stack import Stack


@contextmanager
def serving(stack: Stack) -> Iterator[Stack]:
    """The stack with an API server, which stack.json tells of; gone at the end."""
    home = Path(stack.home)
    token = api_server.ensure_token(home)
    stack.save()
    port = ports.anywhere(set())
    process = api_server.start(home, ports.LOOPBACK, port)
    served = replace(
        stack,
        api_url=api_server.uri(ports.LOOPBACK, port),
        api_token_path=str(token),
        processes={**stack.processes, "api": processes.record(process, port=port)},
    )
    served.save()
    try:
        yield served
    finally:
        processes.stop(api_server.leftovers(home), grace=5)


def client(stack: Stack) -> HttpCatalog:
    return HttpCatalog(stack.api_url, Path(stack.api_token_path).read_text())
