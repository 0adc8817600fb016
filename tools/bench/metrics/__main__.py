"""`make bench-metrics`: what metrics cost and how much the tracker takes, beside the peers, in one run.

Runs against a stack of its own. Rounds are interleaved: in each, ours and every peer take their turn, so that a busy
machine is slow for all. Prints a table and writes build/bench/metrics.json. `--only log,chart` runs parts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).parent.parent)]

import logging_cost  # noqa: E402
import reading  # noqa: E402
import scale  # noqa: E402
import stored_bytes  # noqa: E402
import throughput  # noqa: E402
import training  # noqa: E402
from environment import ROOT, BenchStack, Peers  # noqa: E402
from rows import Row, load, save, table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/bench/metrics", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="log,sustained,bytes,watch,chart,agents,runs,training")
    parser.add_argument("--runs", type=int, default=100_000, help="open runs of the part `runs`")
    parser.add_argument("--seconds", type=int, default=300, help="how long the part `runs` lasts")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "bench" / "peers")
    arguments = parser.parse_args()
    peers = Peers(arguments.peers)
    rounds: int = arguments.rounds
    parts: dict[str, Callable[[BenchStack], Iterable[Row]]] = {
        "log": lambda stack: logging_cost.measure(stack, peers, rounds),
        "sustained": lambda stack: throughput.measure(stack, peers, rounds),
        "bytes": lambda stack: stored_bytes.measure(stack, peers),
        "watch": reading.watch,
        "chart": lambda _: reading.chart(rounds),
        "agents": scale.agents,
        "runs": lambda stack: scale.runs(stack, arguments.runs, arguments.seconds),
        "training": lambda stack: training.measure(stack, 12 * rounds),
    }
    if len(wanted := arguments.only.split(",")) == 1:
        with BenchStack() as stack:
            found = list(parts[wanted[0]](stack))
        save("metrics", found)
        print(table(found), flush=True)
        return 0 if all(row.holds is not False for row in found) else 1
    # Each part in a process with a stack of its own: none inherits another's backlog, and a process that was connected
    # to one Ray cluster keeps its token for the next.
    codes = [subprocess.run([sys.executable, *sys.argv, "--only", name]).returncode for name in wanted]
    print(f"\n{table(load('metrics'))}", flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
