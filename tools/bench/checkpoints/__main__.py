"""`make bench-checkpoints`: what saving costs a training, ours beside the others, in one run.

Every part has its contenders take turns, in an order by lot, so that a busy machine is slow for all. Prints a table and
writes build/bench/checkpoints.json. `--only stall,lost` runs parts; `--quick` runs all of them on little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import durable  # noqa: E402
import loop  # noqa: E402
import lost  # noqa: E402
import memory  # noqa: E402
import profile_call  # noqa: E402
import stall  # noqa: E402
from environment import ROOT, peers_python  # noqa: E402
from plan import EVERYONE, Plan  # noqa: E402
from rows import Row, run  # noqa: E402

PARTS = "stall,lost,durable,restore,loop,memory"


def main() -> int:
    given = _arguments()
    python = peers_python(given.peers)
    plan = Plan(
        python=python, directory=given.directory, size_mib=given.size_mib, rounds=given.rounds, saves=given.saves,
        peer_rounds=given.peer_rounds, peer_saves=given.peer_saves, lost_rounds=max(2, given.rounds - 2),
        contenders=[name for name in EVERYONE if _is_wanted(name, given.contenders)],
    )  # fmt: skip
    pairs = 3 if given.quick else 8
    parts: dict[str, Callable[[], Iterable[Row]]] = {
        "stall": lambda: _each(
            stall.measure(plan, tensors, world) for world in given.ranks for tensors in given.tensors
        ),
        "lost": lambda: _each(lost.measure(plan, world) for world in given.ranks),
        "durable": lambda: _each(durable.measure(plan, world, 2 * pairs) for world in given.ranks),
        "restore": lambda: durable.restore(plan, pairs),
        "loop": lambda: loop.measure(plan, pairs, is_quick=given.quick),
        "memory": lambda: _each(memory.measure(plan, world) for world in given.ranks),
        "profile": lambda: _each(
            profile_call.measure(plan, tensors, world) for world in given.ranks for tensors in given.tensors
        ),
    }
    return run("checkpoints", parts, given.only.split(","), is_whole=given.only == PARTS)


def _each(many: Iterable[Iterable[Row]]) -> Iterable[Row]:
    return (row for rows in many for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench/checkpoints", description=__doc__)
    parser.add_argument("--only", default=PARTS, help="and `profile`")
    parser.add_argument("--quick", action="store_true", help="a tenth of the state, few rounds: to see that it runs")
    parser.add_argument("--size-mib", type=int, default=1024, help="of parameters and moments")
    parser.add_argument("--tensors", type=_numbers, default=[150, 2000])
    parser.add_argument("--ranks", type=_numbers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=20, help="of ours and of the floor, in each round")
    parser.add_argument("--peer-saves", type=int, default=3, help="of each other contender, in a round")
    parser.add_argument("--peer-rounds", type=int, default=2, help="rounds in which the others take part")
    parser.add_argument("--contenders", default="", help="only those with one of these words in their name")
    parser.add_argument("--peers", type=Path, default=ROOT / "build" / "bench" / "peers-checkpoints")
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "bench" / "checkpoints")
    given = parser.parse_args()
    if given.quick:
        given.size_mib, given.rounds, given.saves, given.peer_saves = 96, 1, 5, 2
    return given


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _is_wanted(name: str, words: str) -> bool:
    return not words or any(word.lower() in name.lower() for word in words.split(","))


if __name__ == "__main__":
    sys.exit(main())
