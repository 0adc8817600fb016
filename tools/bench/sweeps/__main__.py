"""`make bench-sweeps`: what a sweep costs beside Ray Tune over TorchTrainer and beside bare processes, in one run.

Prints a table and writes build/bench/sweeps.json. `--only short,asha` runs parts; `--quick` runs all of them on little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import asha_vs_random  # noqa: E402
import many  # noqa: E402
import short  # noqa: E402
from rows import Row, run  # noqa: E402

PARTS = "asha,short,lanes,instant,late"


def main() -> int:
    given = _arguments()
    parts: dict[str, Callable[[], Iterable[Row]]] = {
        "asha": asha_vs_random.measure,
        "short": lambda: short.measure(given.trials, given.rounds),
        "lanes": lambda: many.lanes(given.per_lane),
        "instant": lambda: many.instant(given.instant, given.late),
        "late": lambda: many.late(given.finished, given.late),
    }
    return run("sweeps", parts, given.only.split(","), is_whole=given.only == PARTS)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/sweeps", description=__doc__)
    parser.add_argument("--only", default=PARTS)
    parser.add_argument("--quick", action="store_true", help="few trials, one round: to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=16, help="short ones, in a round")
    parser.add_argument("--per-lane", type=int, default=24, help="trials of `lanes`, for each lane")
    parser.add_argument("--instant", type=int, default=1000)
    parser.add_argument("--late", type=int, default=200, help="instant ones, on a sweep that has those before")
    parser.add_argument("--finished", type=int, default=10_000, help="trials that the sweep of `late` has before")
    given = parser.parse_args()
    if given.quick:
        given.rounds, given.trials, given.per_lane = 1, 3, 10
        given.instant, given.late, given.finished = 20, 5, 30
    return given


if __name__ == "__main__":
    sys.exit(main())
