"""`orc sweep extend|set|hold|continue|stop|retry`: what is asked of a sweep. Its driver answers within a second; where
none runs, the next `orc sweep resume` does."""

from __future__ import annotations

import argparse
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import psutil

from orchestrator.account import user_name
from orchestrator.catalog import open_catalog, open_store
from orchestrator.cli import runs
from orchestrator.cli.output import Output
from orchestrator.cli.sweep_show import so_far
from orchestrator.errors import UserError

WAIT = 5.0
"""Seconds in which a living driver answers."""


def extend(arguments: argparse.Namespace, output: Output) -> int:
    details: dict[str, Any] = {}
    settings = []
    for word in arguments.more:
        if re.fullmatch(r"\+?\d+", word):
            details["samples"] = details.get("samples", 0) + int(word)
        else:
            settings.append(word)
    return _ask(arguments, output, "extend", {**settings_of(settings), **details})


def set_(arguments: argparse.Namespace, output: Output) -> int:
    return _ask(arguments, output, "set", settings_of(arguments.overrides))


def hold(arguments: argparse.Namespace, output: Output) -> int:
    return _ask(arguments, output, "hold", {"trials": arguments.trials})


def continue_(arguments: argparse.Namespace, output: Output) -> int:
    return _ask(arguments, output, "continue", {"trials": arguments.trials})


def stop(arguments: argparse.Namespace, output: Output) -> int:
    """Without trials as `orc cancel`: what runs saves first, and `orc sweep resume` goes on."""
    if arguments.trials:
        return _ask(arguments, output, "stop", {"trials": arguments.trials})
    with open_catalog(arguments.home) as catalog:
        sweep = catalog.sweep(arguments.sweep)
    arguments.run = sweep.sweep
    return runs.cancel(arguments, output)


def retry(arguments: argparse.Namespace, output: Output) -> int:
    return _ask(arguments, output, "retry", {"trials": arguments.trials})


def _ask(arguments: argparse.Namespace, output: Output, kind: str, details: Mapping[str, Any]) -> int:
    """Exit codes: 0 done, or left for the next resume; 1 refused."""
    with open_catalog(arguments.home) as catalog:
        sweep = catalog.sweep(arguments.sweep)
    is_driven = not sweep.status.is_terminal and not is_gone(sweep.driver)
    with open_store(arguments.home) as store:
        request = store.ask_sweep(sweep.sweep, kind, details, user_name())
    answer = _answer(arguments, sweep.sweep, request) if is_driven else ""
    document = {"sweep": sweep.sweep, "request": request, "kind": kind, "details": dict(details), "answer": answer}
    rest = None
    if kind == "extend" and not answer.startswith("refused"):
        with open_catalog(arguments.home) as catalog:
            rest = so_far(catalog, catalog.sweep(sweep.sweep)).left
        document["left"] = asdict(rest) if rest else None

    def render() -> None:
        if answer:
            output.line(answer)
        elif is_driven:
            output.line(f"asked; sweep {sweep.name} has not answered yet, `orc sweep show` tells")
        else:
            output.line(f"noted; it is done when sweep {sweep.name} goes on: orc sweep resume {sweep.name}")
        if rest:
            output.line(f"left  {rest}")

    output.result(document, render)
    return 1 if answer.startswith("refused") else 0


def _answer(arguments: argparse.Namespace, sweep: str, request: int) -> str:
    """'' where there is none in time."""
    deadline = time.monotonic() + WAIT
    with open_catalog(arguments.home) as catalog:
        while True:
            rows = catalog.sweep_requests(sweep)
            if found := next((row.answer for row in rows if row.id == request and row.done_at is not None), ""):
                return found
            if time.monotonic() > deadline:
                return ""
            time.sleep(0.2)


def is_gone(driver: str) -> bool:
    """Of a name that `execution.sweep_place.driver_name` made."""
    host, _, rest = driver.partition("/")
    pid = rest.partition("/")[0]
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """`sweep.concurrency=2` as what a request says. Raises UserError."""
    found: dict[str, Any] = {}
    space: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word} changes nothing. Write sweep.KEY=VALUE, for example sweep.concurrency=2.")
        if key.startswith("sweep.space."):
            space[key.removeprefix("sweep.space.")] = value
        elif key.startswith("sweep."):
            found[key.removeprefix("sweep.")] = _number(key, value)
        else:
            space[key] = value
    return {**found, **({"space": space} if space else {})}


def _number(key: str, value: str) -> int | float:
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{key} is a number, not {value!r}.") from None
