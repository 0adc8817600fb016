"""The entry point of jobs: `python -m orchestrator.launch train key=value …`, with the options of `orc run`, and
`… sweep key=value …` or `… sweep resume S` with those of `orc sweep`; `… resume RUN` with those of `orc resume`.

Made for `ray job submit`, also from a project that has a `jobs/` folder of its own: it needs nothing but this package.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from orchestrator.cli import main as cli
from orchestrator.cli import text

KINDS = {"train": "run", "sweep": "sweep", "resume": "resume"}
"""What can be launched, and the verb of `orc` that does it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Gives the exit code: 0 when the run FINISHED."""
    words = list(sys.argv[1:] if argv is None else argv)
    kind = words[0] if words else ""
    if kind not in KINDS:
        near = text.did_you_mean(text.nearest(kind, KINDS))
        print(f"orchestrator.launch: {kind or 'nothing'} cannot be launched.{near}", file=sys.stderr)
        print(f"usage: python -m orchestrator.launch {{{'|'.join(KINDS)}}} [key=value …]", file=sys.stderr)
        return cli.USER_ERROR
    return cli.main([KINDS[kind], *words[1:]])


if __name__ == "__main__":
    sys.exit(main())
