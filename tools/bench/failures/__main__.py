"""`make bench-failures`: what a failure costs: a killed worker, a lost node, killed services, the guards.

Prints a table and writes build/bench/failures.json. `--only kill,node` runs parts; `--quick` runs all on little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import kill  # noqa: E402
import node  # noqa: E402
import services  # noqa: E402
from rows import Row, run  # noqa: E402

PARTS = "kill,node,services,guards"


def main() -> int:
    given = _arguments()
    parts: dict[str, Callable[[], Iterable[Row]]] = {
        "kill": lambda: kill.measure(given.repetitions),
        "node": lambda: node.measure(given.repetitions),
        "services": lambda: services.measure(given.blocks, given.seconds),
        "guards": lambda: _guards(given.quick),
    }
    return run("failures", parts, given.only.split(","), is_whole=given.only == PARTS)


def _guards(is_quick: bool) -> Iterator[Row]:
    import guards  # torch, which no other part needs in this process

    return (Row(**row) for row in guards.rows(*([3] if is_quick else [])))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/failures", description=__doc__)
    parser.add_argument("--only", default=PARTS)
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it runs")
    parser.add_argument("--repetitions", type=int, default=5, help="kills of workers, and losses of nodes")
    parser.add_argument("--blocks", type=int, default=3, help="of `services`, with kills and without")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long such a block lasts")
    given = parser.parse_args()
    if given.quick:
        given.repetitions, given.blocks, given.seconds = 1, 1, 20.0
    return given


if __name__ == "__main__":
    sys.exit(main())
