"""`orc export` and `orc import`: one run with everything that belongs to it, as one bundle."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from orchestrator.catalog import open_store
from orchestrator.catalog.database import DatabaseCatalog
from orchestrator.cli import text
from orchestrator.cli.output import Output
from orchestrator.directory import bundle
from orchestrator.errors import ConfigError
from orchestrator.stack import Stack


def export(arguments: argparse.Namespace, output: Output) -> int:
    with open_store(arguments.home) as store:
        run = DatabaseCatalog(store).run(arguments.run).run
        target = Path(arguments.output or f"{run}.tar.gz")
        with Told(output) as watch:
            written = bundle.write(store, run, target, with_checkpoints=not arguments.no_checkpoints, watch=watch)

    def render() -> None:
        size = text.size(written.size_bytes)
        output.line(f"{written.path}: run {written.name}, {written.files} files, {size}, {written.points:,} points")

    output.result(written, render)
    return 0


def import_(arguments: argparse.Namespace, output: Output) -> int:
    storage_url = Stack.load(arguments.home).storage_url
    if not storage_url:
        raise ConfigError("storage.url", None, "this stack has no place for files.", "Run `orc up`.")
    with open_store(arguments.home) as store, Told(output) as watch:
        taken = bundle.read(store, Path(arguments.file), storage_url, watch=watch)

    def render() -> None:
        if not taken.is_new:
            output.line(f"run {taken.name} ({taken.run}) is here already, the same; nothing was changed")
            return
        output.line(f"run {taken.name} ({taken.run}): {taken.files} files, {taken.points:,} points")
        output.line(f"in {taken.directory}")
        if taken.missing_parents:
            output.line(f"It descends from {', '.join(taken.missing_parents)}, which is not here.")

    output.result(taken, render)
    return 0


class Told:
    """A line on the terminal that says how far it is, from two seconds on."""

    def __init__(self, output: Output) -> None:
        self._stream = output.stderr
        self._is_shown = not output.as_json and output.stderr.isatty()
        self._next = time.monotonic() + 2

    def __enter__(self) -> Told:
        return self

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        if not self._is_shown or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.3
        of = f" of {text.size(total_bytes)}" if total_bytes else ""
        self._stream.write(f"\r\033[K{text.size(done_bytes)}{of}  {text.one_line(what, 60)}")
        self._stream.flush()

    def __exit__(self, *_: object) -> None:
        if self._is_shown:
            self._stream.write("\r\033[K")
            self._stream.flush()
