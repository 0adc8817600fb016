"""`python -m cluster up|down|status|doctor|keep [--home DIR] [--json] [--debug] [key=value …]`: what `orc` runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.progress import Progress
from orchestrator.errors import ConfigError, UserError
from orchestrator.stack import Stack, StackSettings, default_home

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
GREEN, RED, DIM, PLAIN = "\033[32m", "\033[31m", "\033[2m", "\033[0m"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parsed(argv)
    signal.signal(signal.SIGINT, _interrupted)
    try:
        return VERBS[arguments.verb](arguments)
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"orc: {error}", file=sys.stderr)
        if arguments.json:
            print(json.dumps({"error": {"type": type(error).__name__, "message": str(error)}}, indent=2))
        return USER_ERROR
    except Exception as error:  # the border of the process: a defect of ours, shown as one
        if arguments.debug:
            raise
        print(
            f"orc: unexpected {type(error).__name__}: {error}\nThis is a defect. `--debug` shows the traceback.",
            file=sys.stderr,
        )
        return FAILED


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster", allow_abbrev=False)
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--home", type=lambda text: Path(text).expanduser().absolute(), default=default_home())
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument("--again", action="store_true", help="of up: as it was told before, unless `down` came since")
    keep = parser.add_argument_group("keep")
    keep.add_argument("--once", action="store_true")
    keep.add_argument("--all", action="store_true")
    keep.add_argument("--local", action="store_true")
    keep.add_argument("--interval", type=float, default=5.0)
    keep.add_argument("--since", type=float, default=24.0)
    keep.add_argument("--most", type=int, default=5)
    return parser.parse_intermixed_args(argv)


def _interrupted(number: int, frame: object) -> None:
    """Ends at once: every verb may be killed at any point, and waiting for threads that wait helps nobody."""
    if sys.stdout.isatty():
        print("\033[?25h", end="", flush=True)  # the spinner hides the cursor
    print(
        "\norc: interrupted; what was started stays, `orc up` goes on and `orc down` ends it",
        file=sys.stderr,
        flush=True,
    )
    os._exit(INTERRUPTED)


def _up(arguments: argparse.Namespace) -> int:
    from cluster import stack_status
    from cluster.stack_up import up

    progress = _progress(arguments)
    if arguments.again:
        settings = StackSettings.from_mapping(Stack.load(arguments.home).asked)
    else:
        settings = StackSettings.parse(arguments.settings)
    stack = up(arguments.home, settings, progress, is_again=arguments.again)
    if arguments.json:
        found = stack_status.parts(stack)
        copies = stack_status.sinks(stack, time.time())
        print(json.dumps(stack_status.document(stack, found, copies, stack_status.writers(stack)), indent=2))
        return OK if stack_status.is_up(found) else FAILED
    return OK


def _down(arguments: argparse.Namespace) -> int:
    from cluster.stack_down import down

    _no_settings(arguments)
    stopped = down(arguments.home, _progress(arguments))
    if arguments.json:
        print(json.dumps({"home": str(arguments.home), "stopped": stopped}, indent=2))
    elif not stopped:
        print(f"nothing runs in {arguments.home}")
    return OK


def _status(arguments: argparse.Namespace) -> int:
    from cluster import stack_status

    _no_settings(arguments)
    stack = Stack.find(arguments.home)
    if stack is None:
        why = "Nothing was started there yet. Run `orc up`."
        if arguments.json:
            print(json.dumps({"home": str(arguments.home), "up": False, "why": why, "parts": []}, indent=2))
        else:
            print(f"{arguments.home}: {why}")
        return FAILED
    found = stack_status.parts(stack)
    copies = stack_status.sinks(stack, time.time())
    if arguments.json:
        print(json.dumps(stack_status.document(stack, found, copies, stack_status.writers(stack)), indent=2))
    else:
        now, states = time.time(), stack_status.circuits(stack)
        rows = [
            (part.name, part.status, stack_status.circuit(part.name, states, now), part.version,
             "" if part.latency_ms is None else f"{part.latency_ms:.1f} ms",
             " ".join(filter(None, [part.address, part.why])))
            for part in found
        ]  # fmt: skip
        _table(("part", "status", "circuit", "version", "latency", "where"), rows)
        if copies:
            lags = [
                (c.name, c.status, stack_status.circuit(c.name, states, now), f"{c.points:,}", f"{c.seconds:.1f} s",
                 f"{c.runs:,}", c.why)
                for c in copies
            ]  # fmt: skip
            print()
            _table(("copies to", "status", "circuit", "points behind", "time behind", "runs behind", "why"), lags)
        if away := stack_status.elsewhere(states, [*(part.name for part in found), *(c.name for c in copies)], now):
            print()
            _table(("needed", "circuit", "why"), away)
        writing = stack_status.writers(stack)
        waiting = (
            f"{writing.pending_bytes / 1e6:,.1f} MB",
            f"{writing.oldest:.1f} s",
            f"{writing.memory_bytes / 1e6:,.1f} MB",
        )
        print()
        heads = ("checkpoints", "status", "not written", "bytes", "oldest", "memory", "why")
        _table(heads, [("writers here", writing.status, str(writing.pending), *waiting, writing.why)])
    return OK if stack_status.is_up(found) else FAILED


def _doctor(arguments: argparse.Namespace) -> int:
    from cluster import stack_doctor

    _no_settings(arguments)
    found = stack_doctor.examine(arguments.home)
    is_well = all(finding.is_ok for finding in found)
    if arguments.json:
        print(json.dumps({"home": str(arguments.home), "ok": is_well, "checks": [asdict(f) for f in found]}, indent=2))
        return OK if is_well else FAILED
    _table(("", "check", "found"), [("ok" if f.is_ok else "problem", f.check, f.says) for f in found])
    for finding in found:
        if not finding.is_ok:
            print(f"\n{finding.check}: {finding.says}\n  mend it: {finding.mend}")
    return OK if is_well else FAILED


def _keep(arguments: argparse.Namespace) -> int:
    from cluster.keeping import Wishes
    from cluster.stack_keep import KeepOptions, keep, on_signal

    _no_settings(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal(sys.stderr))
    wishes = Wishes(is_all=arguments.all, is_local=arguments.local, most=arguments.most)
    options = KeepOptions(
        wishes=wishes, interval=arguments.interval, is_once=arguments.once, since=arguments.since * 3600,
        is_json=arguments.json,
    )  # fmt: skip
    return keep(arguments.home, options, sys.stdout)


def _progress(arguments: argparse.Namespace) -> Progress:
    """Lines about the progress are the result for people; beside a JSON document they go to stderr."""
    return Progress(sys.stderr if arguments.json else sys.stdout)


def _no_settings(arguments: argparse.Namespace) -> None:
    if arguments.settings:
        why = f"`{arguments.verb}` takes no settings."
        raise ConfigError(arguments.settings[0], None, why, "`orc up` does.")


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(heads), *cells]) for column in range(len(heads))]
    coloured = sys.stdout.isatty()
    colours = dict.fromkeys(("up", "ok"), GREEN) | dict.fromkeys(("off", "idle"), DIM)
    colours |= dict.fromkeys(("down", "problem", "failing", "stopped"), RED)
    for row in [list(heads), *cells]:
        padded = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        if coloured:
            padded = [f"{colours[c]}{p}{PLAIN}" if c in colours else p for c, p in zip(row, padded, strict=True)]
        print("  ".join(padded).rstrip())


VERBS = {"up": _up, "down": _down, "status": _status, "doctor": _doctor, "keep": _keep}

if __name__ == "__main__":
    sys.exit(main())
