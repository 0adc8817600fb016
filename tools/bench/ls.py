"""`make bench-ls`: what `orc ls` costs over 10,000 runs, beyond the start of a Python interpreter.

A data directory of its own with a real PostgreSQL, filled by bulk SQL, and a real API server; both are gone at the end.
The commands take turns, so that a busy machine is slow for all of them. Prints a table and writes build/bench/ls.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import many_runs  # noqa: E402
from rows import Row, at_most, printed, save, table  # noqa: E402

from cluster import api_server, ports, processes  # noqa: E402
from cluster.postgres import EmbeddedPostgres  # noqa: E402
from orchestrator.backends.postgres import conninfo  # noqa: E402
from orchestrator.stack import Stack  # noqa: E402
from orchestrator.store import migrate  # noqa: E402

ORC = str(Path(sys.executable).with_name("orc"))
START = "python -c pass"
BAR_MS = 200.0
"""What `orc ls` may take beyond the interpreter's start."""


@contextmanager
def filled_stack(runs: int) -> Iterator[tuple[Stack, Stack]]:
    """The same database twice: as a stack with an API server, and as one without."""
    directory = Path(tempfile.mkdtemp(prefix="orcb-"))  # short: a socket lives in it
    directory.chmod(0o711)  # as root PostgreSQL runs as `nobody`, who must pass through
    server = EmbeddedPostgres(directory / "pg")
    try:
        server.start()
        server.ensure_database("orc")
        migrate.upgrade(server.url("orc"))
        many_runs.fill(conninfo(server.url("orc")), runs)
        with_api, without = (Stack(home=str(directory / name), database_url=server.url("orc")) for name in "ad")
        for stack in (with_api, without):
            Path(stack.home).mkdir()
            stack.save()
        home = Path(with_api.home)
        token, port = api_server.ensure_token(home), ports.anywhere(set())
        process = api_server.start(home, ports.LOOPBACK, port)
        served = replace(
            with_api, api_url=api_server.uri(ports.LOOPBACK, port), api_token_path=str(token),
            processes={"api": processes.record(process, port=port)},
        )  # fmt: skip
        served.save()
        yield served, without
    finally:
        processes.stop(api_server.leftovers(directory / "a"), grace=5)
        server.stop()
        shutil.rmtree(directory)


def commands(served: Stack, without: Stack) -> dict[str, list[str]]:
    lists = {"orc ls": ["ls"], "orc ls --all": ["ls", "--all"], "orc ls --all --json": ["ls", "--all", "--json"]}
    return {START: [sys.executable, "-c", "pass"]} | {
        f"{name}, through the {through}": [ORC, "--home", stack.home, *words]
        for through, stack in (("API", served), ("database", without))
        for name, words in lists.items()
    }


def measured(wanted: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each command, in turns; one round before to warm up."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ORC_")}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    for place in range(rounds + 1):
        for name, command in wanted.items():
            started = time.perf_counter()
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            if place:
                seconds[name].append(time.perf_counter() - started)
        print(f"\rround {place} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return seconds


def found_rows(seconds: dict[str, list[float]], runs: int) -> list[Row]:
    start = statistics.median(seconds[START])
    found = [printed(START, start * 1000, "ms")]
    for name, taken in seconds.items():
        if name == START:
            continue
        beyond = (statistics.median(taken) - start) * 1000
        bar = f"{name}, {runs:,} runs: beyond the interpreter's start"
        is_promised = name == "orc ls, through the API"
        found.append(at_most(bar, beyond, BAR_MS, "ms") if is_promised else printed(bar, beyond, "ms"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench/ls.py")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with filled_stack(arguments.runs) as (served, without):
        found = found_rows(measured(commands(served, without), arguments.rounds), arguments.runs)
    save("ls", found)
    print(table(found))
    return 0 if all(row.holds is not False for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
