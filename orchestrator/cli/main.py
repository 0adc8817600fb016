"""`orc`: choose the verb, run it, turn what goes wrong into one message and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence

from orchestrator.cli import parser
from orchestrator.cli.output import Output
from orchestrator.errors import UserError

OK, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
READER_LEFT = 141
"""What a shell reports for a program that a closed pipe ended, as in `orc ls | head -1`."""

Action = Callable[[argparse.Namespace, Output], int]


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Never raises what a user caused: the exit code tells."""
    words = list(sys.argv[1:] if argv is None else argv)
    output = Output(as_json="--json" in words)
    debug = "--debug" in words
    try:
        verb, arguments = parser.parse(words)
        # What a user's module prints while it is imported must not mix with the one JSON document.
        with contextlib.redirect_stdout(output.stderr) if output.as_json else contextlib.nullcontext():
            return action(verb)(arguments, output)
    except SystemExit as exit:  # argparse after --help
        return int(exit.code or 0)
    except KeyboardInterrupt:
        output.message("orc: interrupted")
        return INTERRUPTED
    except BrokenPipeError as error:
        return READER_LEFT if _reader_left() else _report(output, error, FAILED, debug)
    except UserError as error:
        return _report(output, error, USER_ERROR, debug)
    except Exception as error:  # the border of the process: a defect of ours, shown as one
        return _report(output, error, FAILED, debug)


def action(verb: parser.Verb) -> Action:
    module, function = verb.target.split(":")
    return getattr(importlib.import_module(f"orchestrator.cli.{module}"), function)


def _reader_left() -> bool:
    """Whether it is stdout whose other end is closed; if so, the interpreter's last flush will not complain again."""
    try:
        stdout = sys.stdout.fileno()
    except (OSError, ValueError):  # not a file, inside another program
        return False
    other_end = select.poll()
    other_end.register(stdout, 0)  # tells only of errors and hang-ups
    if not other_end.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True


def _report(output: Output, error: Exception, code: int, debug: bool) -> int:
    """One message on stderr; with --json also the document {"error": …}, so that stdout always holds one."""
    if debug:
        import traceback  # takes as long to load as all of ours

        traceback.print_exception(error, file=output.stderr)
    kind = type(error).__name__
    if code == USER_ERROR:
        output.message(f"orc: {error}")
    else:
        output.message(
            f"orc: unexpected {kind}: {error}" + ("" if debug else "\nThis is a defect. `--debug` shows the traceback.")
        )
    if output.as_json and not output.has_result:
        output.result({"error": {"type": kind, "message": str(error)}}, lambda: None)
    return code


if __name__ == "__main__":
    sys.exit(main())
