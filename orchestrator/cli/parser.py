"""Every verb of `orc`: what it takes, what it is for, and which function does it.

Functions are named, not imported: `orc --help` and every verb load only what they need.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.cli import text
from orchestrator.errors import UserError
from orchestrator.stack import default_home


class UsageError(UserError):
    """A command line that makes no sense. `usage` is the line that would."""

    def __init__(self, message: str, usage: str = "") -> None:
        super().__init__(message, usage)
        self.message, self.usage = message, usage

    def __str__(self) -> str:
        return f"{self.message}\n{self.usage}".rstrip()


class Parser(argparse.ArgumentParser):
    """argparse that raises `UsageError` instead of ending the process, and takes no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        unknown, known = message.partition("unrecognized arguments: ")[2].split(), self._option_string_actions
        near = text.nearest(unknown[0].split("=")[0], known) if unknown else ()
        raise UsageError(f"{message}.{text.did_you_mean(near)}", self.format_usage().strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One command. `target` is "module:function" in orchestrator.cli, called with (arguments, output), giving the exit
    code."""

    name: str
    """One word, or two: "db upgrade"."""
    topic: str
    summary: str
    target: str
    define: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    epilog: str = ""


RUN = "a run: its id, the beginning of its id, its name, or `last`"


def _global_options(parser: argparse.ArgumentParser) -> None:
    """Accepted before and after the verb; SUPPRESS, or the second parser would reset what the first one read."""
    group = parser.add_argument_group("everywhere")
    group.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one JSON document on stdout")
    group.add_argument(
        "--home", metavar="DIR", default=argparse.SUPPRESS, help="the data directory (default: $ORC_HOME, else ~/.orc)"
    )
    group.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")


def _composition(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="sets a key; `group=option` picks one, `+key=value` adds a key, `~key` drops one",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own configs, searched before ours")
    parser.add_argument("--from", dest="base", metavar="RUN", help="start from the stored config of a run")


def _train(parser: argparse.ArgumentParser) -> None:
    _composition(parser)
    parser.add_argument("--name", metavar="NAME", help="the run's name (default: a pronounceable one)")
    parser.add_argument("--run-id", metavar="ID", default="", help="the id that the new run shall have (default: made)")
    _local(parser)


def _local(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--local", action="store_true", help="without Ray: the ranks are processes of this host")


SWEEP = "a sweep: its id, the beginning of its id, its name, or `last` for the newest"


def _sweep(parser: argparse.ArgumentParser) -> None:
    _composition(parser)
    parser.add_argument("--name", metavar="NAME", help="the sweep's name (default: a pronounceable one)")
    parser.add_argument("--run-id", metavar="ID", default="", help="the id that the sweep shall have (default: made)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done, and refuse what would be")
    _local(parser)


def _sweep_resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP)
    parser.add_argument(
        "overrides", nargs="*", metavar="sweep.key=value", help="what shall change, as with `orc sweep set`"
    )
    parser.add_argument("--failed", action="store_true", help="run the failed trials again")
    _local(parser)


def _sweep_extend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP)
    parser.add_argument("more", nargs="+", metavar="+N|sweep.budget.KEY=VALUE", help="more trials, or a larger budget")


def _sweep_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP)
    parser.add_argument("overrides", nargs="+", metavar="sweep.key=value", help="keys of the sweep section")


def _sweep_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", nargs="?", default="last", help=f"{SWEEP} (default)")


def _sweep_show(parser: argparse.ArgumentParser) -> None:
    _sweep_reference(parser)
    parser.add_argument("--trials", metavar="N", type=_natural, default=12, help="best N trials (default 12)")
    _api(parser)


def _sweep_watch(parser: argparse.ArgumentParser) -> None:
    _sweep_show(parser)
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=2.0, help="time between two looks (default 2)"
    )
    parser.add_argument("--once", action="store_true", help="how it stands now, and end")


def _sweep_best(parser: argparse.ArgumentParser) -> None:
    _sweep_reference(parser)
    parser.add_argument("-n", dest="count", metavar="K", type=_positive, default=1, help="best K trials (default 1)")
    parser.add_argument("--metric", metavar="KEY", default="", help="another objective of the sweep")
    _api(parser)


def _sweep_trials(parser: argparse.ArgumentParser) -> None:
    _sweep_reference(parser)
    parser.add_argument(
        "--status", "-s", metavar="STATUS", default="", help="running, waiting, complete, stopped, failed, cancelled"
    )
    _api(parser)


def _sweep_some(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP)
    parser.add_argument("trials", metavar="TRIAL", nargs="+", type=_natural, help="numbers of trials")


def _sweep_some_or_all(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP", help=SWEEP)
    parser.add_argument("trials", metavar="TRIAL", nargs="*", type=_natural, help="numbers of trials (default: all)")


def _sweep_verify(parser: argparse.ArgumentParser) -> None:
    _sweep_reference(parser)
    _api(parser)


def _submit(parser: argparse.ArgumentParser) -> None:
    _composition(parser)
    parser.add_argument("--name", metavar="NAME", help="the run's name (default: a pronounceable one)")
    parser.add_argument("--working-dir", metavar="DIR", default=".", help="the project to send (default: here)")
    parser.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[],
        help="what is not sent, as in a .gitignore; may be given several times",
    )  # fmt: skip
    parser.add_argument(
        "--env", metavar="NAME", action="append", default=[],
        help="an environment variable that the job gets from here; no secrets: who may list jobs can read it",
    )  # fmt: skip
    parser.add_argument(
        "--in-place", action="store_true",
        help="send nothing: the job runs in the working directory, which the cluster's head must see",
    )  # fmt: skip
    parser.add_argument("--detach", "-d", action="store_true", help="do not wait for the job")
    parser.add_argument(
        "--id", metavar="ID", default="", help="the job's id; a job that has it already is followed, not started again"
    )
    parser.add_argument(
        "--address", metavar="URL", default="",
        help="the cluster's job server, http://HEAD:8265 (default: $RAY_API_SERVER_ADDRESS, else the stack's)",
    )  # fmt: skip


def _resume(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="what shall be different in this attempt")
    parser.add_argument("--config-dir", metavar="DIR", help="a directory with configs of your own")
    _local(parser)


def _services(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="e.g. database.url=… ray.address=… mlflow.enabled=false"
    )


def _keep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="look once, answer what is found, and end")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds, default=5.0, help="time between two looks (default 5)"
    )
    parser.add_argument("--all", action="store_true", help="every interrupted run (default: those with run.keep=true)")
    parser.add_argument("--local", action="store_true", help="runs without Ray, too, as processes of this host")
    parser.add_argument(
        "--since", metavar="HOURS", type=_hours, default=24.0, help="only runs that ended so long ago (default 24)"
    )
    parser.add_argument(
        "--most", metavar="N", type=_positive, default=5,
        help="times that a run whose attempts live less than ten minutes is begun again (default 5)",
    )  # fmt: skip


def _api(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api", metavar="URL", default="",
        help="ask the API server of another host, http://HEAD:8600 (default: $ORC_API_URL, else the stack); its token "
        "is taken from $ORC_API_TOKEN or the file $ORC_API_TOKEN_PATH",
    )  # fmt: skip


def _ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("search", nargs="?", help="part of a run's name or id")
    parser.add_argument("--experiment", "-e", metavar="NAME")
    parser.add_argument("--status", "-s", metavar="STATUS", help="running, finished, failed, crashed, cancelled …")
    parser.add_argument(
        "--tag", "-t", metavar="NAME=VALUE", action="append", default=[], help="may be given several times"
    )
    parser.add_argument("--limit", "-n", metavar="N", type=_positive, default=20, help="newest N (default 20)")
    parser.add_argument("--all", "-a", action="store_true", help="no limit")
    parser.add_argument("--trials", action="store_true", help="also the runs of sweeps' trials")
    _api(parser)


def _run_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="last", help=f"{RUN} (default)")


def _show(parser: argparse.ArgumentParser) -> None:
    _run_reference(parser)
    _api(parser)


def _watch(parser: argparse.ArgumentParser) -> None:
    _run_reference(parser)
    parser.add_argument(
        "--keys", metavar="KEY", nargs="+", help="only these; patterns as in a shell: 'val/*' 'system/*'"
    )
    parser.add_argument("--rank", metavar="N|all", default="", help="one rank, or all (default: each key's lowest)")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_seconds,
        help="least time between two looks (default: 0.25 on a terminal, 2 for lines, 0 with --json)",
    )  # fmt: skip
    parser.add_argument("--once", action="store_true", help="how it stands now, and end")
    parser.add_argument("--no-redis", action="store_true", help="ask the database, every half second")
    _api(parser)


def _alerts_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help=f"{RUN}; default: all")
    parser.add_argument("--all", "-a", action="store_true", help="also those that are over")
    _api(parser)


def _alerts_test(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", metavar="NOTIFIER|key=value", nargs="*",
        help="log, slack, webhook, pagerduty, email (default: all that the configuration names), and overrides",
    )  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own configs, searched before ours")


def _cancel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN)


def _logs(parser: argparse.ArgumentParser) -> None:
    _run_reference(parser)
    parser.add_argument(
        "--rank", metavar="N|all", default="", help="one rank, or all of them (default: the driver and rank 0)"
    )
    parser.add_argument("--attempt", metavar="N", type=_positive, help="default: the newest")
    parser.add_argument("--tail", "-n", metavar="N", type=_natural, help="only the last N lines of each file")
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the run ends")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--structured", action="store_true", help="the JSON lines instead, of all sources by time")
    kind.add_argument("--stacks", action="store_true", help="where the threads of its ranks stood when it hung")
    parser.add_argument(
        "--service", metavar="NAME", default="", help="the log of a service instead: tracker, mirror, node, mlflow …"
    )
    _api(parser)


def _rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help=RUN)
    parser.add_argument("--force", action="store_true", help="also a run that has not ended, as far as anybody knows")
    parser.add_argument("--trials", action="store_true", help="of a sweep: with the runs of all its trials")
    parser.add_argument("--keep-files", action="store_true", help="remove the record, leave the run's directory")
    _removal(parser)


def _export(parser: argparse.ArgumentParser) -> None:
    _run_reference(parser)
    parser.add_argument(
        "--output", "-o", metavar="FILE|DIR", default="",
        help="a .tar.gz or .tar, else a directory; must not exist yet (default: <run>.tar.gz)",
    )  # fmt: skip
    parser.add_argument("--no-checkpoints", action="store_true", help="leave checkpoints out")


def _import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE|DIR", help="made by `orc export`")


CHECKPOINT = (
    "a run's newest checkpoint, or RUN@NAME where NAME is a checkpoint's name, label or step, `latest` or `best`; "
    "instead of RUN a directory or URL may be given, which asks no database"
)


def _checkpoint_ls(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="last", help=f"{RUN} (default); or a directory or URL")
    parser.add_argument("--all", "-a", action="store_true", help="also those that were deleted or set aside as damaged")
    _api(parser)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN[@NAME]", nargs="?", default="last", help=CHECKPOINT)


def _checkpoint_verify(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    parser.add_argument("--all", "-a", action="store_true", help="all checkpoints of the run")


def _checkpoint_export(parser: argparse.ArgumentParser) -> None:
    _checkpoint(parser)
    parser.add_argument(
        "--format", "-f", choices=("pt", "safetensors", "dcp"), default="pt",
        help="pt: a state_dict for torch.load (default); safetensors: the model in one file; dcp: a directory for "
        "torch.distributed.checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--output", "-o", metavar="FILE|DIR", default="", help="must not exist yet (default: <run>-<name>.pt, here)"
    )


def _checkpoint_pin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="RUN@NAME", help="NAME may be `latest` or `best`")


def _checkpoint_rm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", metavar="RUN@NAME", nargs="+", help="NAME may be `latest` or `best`")
    parser.add_argument(
        "--force", action="store_true", help="also what is pinned or being read, and the newest of an active run"
    )
    _removal(parser)


def _checkpoint_gc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help=f"{RUN}; default: all")
    parser.add_argument("--experiment", "-e", metavar="NAME", help="all runs of an experiment")
    parser.add_argument("--keep-last", metavar="N", type=_positive, help="the newest N; without it what the run says")
    parser.add_argument("--keep-best", metavar="N", type=_natural, help="the best N by each metric the run names")
    parser.add_argument("--keep-every-steps", metavar="N", type=_natural, help="one in every N steps")
    parser.add_argument("--keep-hours", metavar="H", type=_amount, help="what is younger than H hours")
    parser.add_argument(
        "--quota-gb", metavar="GB", type=_amount, default=0.0,
        help="all these runs together may have this much, in 10^9 bytes; the oldest go first, a run keeps its newest",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed; so it is without --yes")
    parser.add_argument("--yes", "-y", action="store_true", help="do it")


def _checkpoint_rebuild(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help=f"{RUN}; default: all")


def _removal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask; needed where there is no terminal")


def _metrics(parser: argparse.ArgumentParser) -> None:
    _run_reference(parser)
    parser.add_argument(
        "keys", metavar="KEY", nargs="*",
        help="give the points of these keys, of many with * and ? in quotes (default: a summary of each key)",
    )  # fmt: skip
    parser.add_argument(
        "--format", "-f", choices=("table", "json", "jsonl", "csv", "parquet"),
        help="default: what the ending of --output says, else a table, which shows long curves in windows",
    )  # fmt: skip
    parser.add_argument("--output", "-o", metavar="FILE", default="", help="write to a file, which must not exist yet")
    parser.add_argument(
        "--rank", metavar="R|all", type=_natural_or_all,
        help="one rank, or each (default: reduced over ranks as declared, else the lowest rank)",
    )  # fmt: skip
    parser.add_argument(
        "--reduce", metavar="HOW", default="",
        help="over ranks: mean, min, max, sum, last, p95, or skew, which is (max - min) / |mean|",
    )  # fmt: skip
    parser.add_argument(
        "--attempt", metavar="N|all", type=_natural_or_all,
        help="one attempt, or all (default: the newest from where it went on, earlier ones before)",
    )  # fmt: skip
    parser.add_argument("--every", metavar="N", type=_positive, default=1, help="only each N-th point of a curve")
    parser.add_argument("--from", dest="start", metavar="STEP", type=int, help="from this step on")
    parser.add_argument("--to", dest="stop", metavar="STEP", type=int, help="up to this step")
    _api(parser)


def _diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN[@ATTEMPT]", help=RUN)
    parser.add_argument("second", metavar="RUN[@ATTEMPT]", help=RUN)
    parser.add_argument("--code", action="store_true", help="show the changed lines of source files")
    _api(parser)


def _fsck(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", nargs="?", default="", help=f"{RUN}; default: all")
    parser.add_argument("--repair", action="store_true", help="mend what can be mended; deletes nothing")


def _config_diff(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="RUN", help=RUN)
    parser.add_argument(
        "second",
        metavar="RUN|key=value",
        nargs="*",
        help="another run, or overrides to compose (default: what `orc run` would use now)",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own configs, searched before ours")


def _backup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="must not exist yet")


def _restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="made by `orc db backup`")
    parser.add_argument("--force", action="store_true", help="replace what the database holds")


def _positive(given: str) -> int:
    value = int(given) if given.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{given!r} is no positive number")
    return value


def _natural_or_all(given: str) -> int | str:
    return given if given == "all" else _natural(given)


def _seconds(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{given!r} is no number of seconds from 0 to 3600")
    return value


def _hours(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value <= 10_000:
        raise argparse.ArgumentTypeError(f"{given!r} is no number of hours from 0 to 10,000")
    return value


def _amount(given: str) -> float:
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{given!r} is no number from 0 up")
    return value


def _natural(given: str) -> int:
    if not given.isdecimal():
        raise argparse.ArgumentTypeError(f"{given!r} is no number from 0 up")
    return int(given)


TRAINING, SWEEPS, LOOKING, CHECKPOINTS = "training", "sweeps", "looking", "checkpoints"
SERVICES, DATABASE, OTHER = "services", "configuration and database", "other"

VERBS: tuple[Verb, ...] = (
    Verb(
        name="run",
        topic=TRAINING,
        summary="train: start a run and show how it goes",
        target="train:run",
        define=_train,
        epilog="example: orc run train=my_project.digits:train resources.workers=2 optim.lr=0.01",
    ),
    Verb(
        name="submit",
        topic=TRAINING,
        summary="train as a Ray job: send this directory to the cluster, follow the job's output",
        target="submit:submit",
        define=_submit,
        epilog="example: orc submit train=my_project.digits:train optim.lr=0.01 --exclude data/ --detach. What is run"
        " may be said first: sweep KEY=VALUE …, resume RUN, sweep resume SWEEP.",
    ),
    Verb(
        name="resume",
        topic=TRAINING,
        summary="go on with a run that was interrupted, as its next attempt",
        target="train:resume",
        define=_resume,
        epilog="example: orc resume last failures.max_restarts=3",
    ),
    Verb(
        name="cancel",
        topic=TRAINING,
        summary="stop a run, keeping everything logged so far",
        target="runs:cancel",
        define=_cancel,
    ),
    Verb(
        name="sweep",
        topic=SWEEPS,
        summary="search over the same function and config: many trials, planned, resumable",
        target="sweep:run",
        define=_sweep,
        epilog="example: orc sweep experiment=digits 'optim.lr=loguniform(1e-4,1e-1)' sweep.samples=16. "
        "More: orc sweep resume|extend|set|show|watch|best|trials|hold|continue|stop|retry|verify.",
    ),
    Verb(
        name="sweep resume",
        topic=SWEEPS,
        summary="go on with a sweep that was interrupted, exactly where it was",
        target="sweep:resume",
        define=_sweep_resume,
        epilog="example: orc sweep resume last",
    ),
    Verb(
        name="sweep extend",
        topic=SWEEPS,
        summary="give a sweep more trials or a larger budget",
        target="sweep_control:extend",
        define=_sweep_extend,
        epilog="example: orc sweep extend last +20",
    ),
    Verb(
        name="sweep set",
        topic=SWEEPS,
        summary="change concurrency, limits or budget of a sweep, also while it runs",
        target="sweep_control:set_",
        define=_sweep_set,
        epilog="example: orc sweep set last sweep.concurrency=2",
    ),
    Verb(
        name="sweep show",
        topic=SWEEPS,
        summary="how a sweep stands: rungs, best trials, history, what mattered",
        target="sweep_show:show",
        define=_sweep_show,
    ),
    Verb(
        name="sweep watch",
        topic=SWEEPS,
        summary="a sweep while it goes on",
        target="sweep_show:watch",
        define=_sweep_watch,
    ),
    Verb(
        name="sweep best",
        topic=SWEEPS,
        summary="configuration, score and checkpoint of the best trials",
        target="sweep_show:best",
        define=_sweep_best,
        epilog="example: orc sweep best last -n 3",
    ),
    Verb(
        name="sweep trials",
        topic=SWEEPS,
        summary="list all trials of a sweep",
        target="sweep_show:trials",
        define=_sweep_trials,
    ),
    Verb(
        name="sweep hold",
        topic=SWEEPS,
        summary="no further jobs for these trials until `orc sweep continue`",
        target="sweep_control:hold",
        define=_sweep_some,
    ),
    Verb(
        name="sweep continue",
        topic=SWEEPS,
        summary="let held trials go on",
        target="sweep_control:continue_",
        define=_sweep_some,
    ),
    Verb(
        name="sweep stop",
        topic=SWEEPS,
        summary="end these trials for good, or with no number the whole sweep gracefully",
        target="sweep_control:stop",
        define=_sweep_some_or_all,
    ),
    Verb(
        name="sweep retry",
        topic=SWEEPS,
        summary="run failed trials again",
        target="sweep_control:retry",
        define=_sweep_some_or_all,
    ),
    Verb(
        name="sweep verify",
        topic=SWEEPS,
        summary="replay every decision of a sweep from what it read",
        target="sweep_show:verify",
        define=_sweep_verify,
        epilog="Exit codes: 0 every decision is the same again, 1 some differ.",
    ),
    Verb(name="ls", topic=LOOKING, summary="list runs, newest first", target="runs:ls", define=_ls),
    Verb(name="show", topic=LOOKING, summary="everything about one run", target="runs:show", define=_show),
    Verb(
        name="watch",
        topic=LOOKING,
        summary="a run while it goes on: newest values, speed, time left",
        target="watch:watch",
        define=_watch,
        epilog="--json prints one line for each change. Exit codes: 0 the run finished, 1 it ended otherwise.",
    ),
    Verb(
        name="alerts ls",
        topic=LOOKING,
        summary="alerts that fire now, and notifications that could not be sent",
        target="alerts:ls",
        define=_alerts_ls,
    ),
    Verb(
        name="alerts test",
        topic=LOOKING,
        summary="send a test message through notifiers, now and from here",
        target="alerts:test",
        define=_alerts_test,
        epilog="example: orc alerts test slack. Exit codes: 0 all were told, 1 some were not.",
    ),
    Verb(name="logs", topic=LOOKING, summary="what a run's processes printed", target="logs:logs", define=_logs),
    Verb(
        name="metrics",
        topic=LOOKING,
        summary="metrics of a run",
        target="metrics:metrics",
        define=_metrics,
        epilog="example: orc metrics last 'train/*' --output train.parquet. Lines of jsonl have step, epoch, phase, "
        "metric and value; NaN and infinities are the strings nan, inf, -inf.",
    ),
    Verb(
        name="diff",
        topic=LOOKING,
        summary="what differs between two runs: config, code, data, packages, machines, results",
        target="diff:diff",
        define=_diff,
        epilog="RUN@2 is its second attempt. Exit codes: 0 same config, code, data and environment, 1 not the same.",
    ),
    Verb(
        name="rm",
        topic=LOOKING,
        summary="remove runs for good: the record, then the files",
        target="removal:rm",
        define=_rm,
        epilog="example: orc rm last --dry-run. A copy in MLflow stays.",
    ),
    Verb(
        name="export",
        topic=LOOKING,
        summary="write a run with all of its files as one bundle",
        target="bundle:export",
        define=_export,
        epilog="example: orc export last --output run.tar.gz",
    ),
    Verb(
        name="import",
        topic=LOOKING,
        summary="bring in a run that was exported elsewhere",
        target="bundle:import_",
        define=_import,
    ),
    Verb(name="experiments", topic=LOOKING, summary="list experiments", target="runs:experiments", define=_api),
    Verb(
        name="checkpoint ls",
        topic=CHECKPOINTS,
        summary="list a run's checkpoints, newest first, and why each is kept",
        target="checkpoints:ls",
        define=_checkpoint_ls,
        epilog="It asks the database, which `orc checkpoint rebuild` puts right; of a directory, it looks there.",
    ),
    Verb(
        name="checkpoint show",
        topic=CHECKPOINTS,
        summary="everything about one checkpoint",
        target="checkpoints:show",
        define=_checkpoint,
        epilog="example: orc checkpoint show last@best",
    ),
    Verb(
        name="checkpoint verify",
        topic=CHECKPOINTS,
        summary="read every byte and compare it with what was written",
        target="checkpoints:verify",
        define=_checkpoint_verify,
        epilog="Changes nothing. Exit codes: 0 every byte is right, 1 something is damaged.",
    ),
    Verb(
        name="checkpoint export",
        topic=CHECKPOINTS,
        summary="write a checkpoint in another form",
        target="checkpoints:export",
        define=_checkpoint_export,
        epilog="example: orc checkpoint export last@best --format pt --output model.pt. The files of a checkpoint are "
        "safetensors already: its model/ opens as it is.",
    ),
    Verb(
        name="checkpoint pin",
        topic=CHECKPOINTS,
        summary="keep a checkpoint from being deleted",
        target="checkpoints:pin",
        define=_checkpoint_pin,
    ),
    Verb(
        name="checkpoint unpin",
        topic=CHECKPOINTS,
        summary="leave it to the rules again",
        target="checkpoints:unpin",
        define=_checkpoint_pin,
    ),
    Verb(
        name="checkpoint rm",
        topic=CHECKPOINTS,
        summary="remove checkpoints for good",
        target="checkpoint_removal:rm",
        define=_checkpoint_rm,
        epilog="example: orc checkpoint rm last@step_00001200-a1 --dry-run",
    ),
    Verb(
        name="checkpoint gc",
        topic=CHECKPOINTS,
        summary="remove what no rule keeps, and what crashes left; says what, does it with --yes",
        target="checkpoint_removal:gc",
        define=_checkpoint_gc,
        epilog="example: orc checkpoint gc --experiment digits --keep-last 1 --yes. Runs in progress are left alone.",
    ),
    Verb(
        name="checkpoint rebuild",
        topic=CHECKPOINTS,
        summary="make the database's list of checkpoints anew from storage, which is the truth",
        target="checkpoints:rebuild",
        define=_checkpoint_rebuild,
        epilog="May be used while everything runs. Exit codes: 0 done, 1 something could not be read.",
    ),
    Verb(
        name="up",
        topic=SERVICES,
        summary="start PostgreSQL, MLflow and Ray, or use given servers",
        target="services:up",
        define=_services,
    ),
    Verb(name="down", topic=SERVICES, summary="stop what `orc up` started", target="services:down"),
    Verb(name="status", topic=SERVICES, summary="each service: up, or why not", target="services:status"),
    Verb(
        name="doctor", topic=SERVICES, summary="what is wrong, and the command that mends it", target="services:doctor"
    ),
    Verb(
        name="keep",
        topic=SERVICES,
        summary="bring back what dies: services, and runs that nobody ended",
        target="services:keep",
        define=_keep,
        epilog="Runs until ctrl-C, which touches nothing else. With --json one document per line. Exit codes of --once:"
        " 0 all that was found was answered, 1 something was not.",
    ),
    Verb(
        name="fsck",
        topic=SERVICES,
        summary="is every point there that was logged, and does it fit together",
        target="fsck:check",
        define=_fsck,
        epilog="May be used while everything runs. Exit codes: 0 all is well (or mended), 1 something is wrong.",
    ),
    Verb(
        name="env",
        topic=SERVICES,
        summary="the environment for plain Ray tools",
        target="services:environment",
        epilog='example: eval "$(orc env)"; ray job submit --working-dir . -- python -m jobs.train experiment=digits',
    ),
    Verb(
        name="config show",
        topic=DATABASE,
        summary="the resolved config of a command",
        target="configs:show",
        define=_composition,
    ),
    Verb(
        name="config diff",
        topic=DATABASE,
        summary="how a run's config differs from another",
        target="configs:diff",
        define=_config_diff,
    ),
    Verb(
        name="config validate",
        topic=DATABASE,
        summary="check a config without running it",
        target="configs:validate",
        define=_composition,
    ),
    Verb(name="db status", topic=DATABASE, summary="the database's schema and size", target="database:status"),
    Verb(
        name="db upgrade",
        topic=DATABASE,
        summary="bring the database to this version's schema",
        target="database:upgrade",
    ),
    Verb(
        name="db backup",
        topic=DATABASE,
        summary="write the database to a file",
        target="database:backup",
        define=_backup,
    ),
    Verb(
        name="db restore",
        topic=DATABASE,
        summary="fill an empty database from a file",
        target="database:restore",
        define=_restore,
    ),
    Verb(name="version", topic=OTHER, summary="versions of this installation", target="services:version"),
)

BY_NAME = {verb.name: verb for verb in VERBS}
GROUPS = tuple(dict.fromkeys(verb.name.split()[0] for verb in VERBS if " " in verb.name))


def parse(argv: Sequence[str]) -> tuple[Verb, argparse.Namespace]:
    """The verb and its arguments, among them `json`, `home` (a Path), `home_is_given` and `debug`.

    Raises UsageError; `--help` prints and raises SystemExit(0).
    """
    top = Parser(prog="orc", usage="orc [--json] [--home DIR] [--debug] VERB …", add_help=False)
    _global_options(top)
    top.add_argument("--help", "-h", action="store_true")
    top.add_argument("--version", action="store_true")
    top.add_argument("words", nargs=argparse.REMAINDER)
    before = top.parse_args(list(argv))
    words = before.words
    if words and words[0].startswith("-"):
        top.error(f"unrecognized arguments: {words[0]}")
    if before.version:
        words = ["version"]
    if words and words[0] == "help":
        words = [*words[1:], "--help"]
    if before.help or not words or words[0] == "--help":
        print(overview())
        raise SystemExit(0)
    verb, rest = _choose(words)
    parser = verb_parser(verb)
    arguments = parser.parse_intermixed_args(rest)
    for option, default in (("json", False), ("home", None), ("debug", False)):
        setattr(arguments, option, getattr(arguments, option, getattr(before, option, default)))
    arguments.home_is_given = bool(arguments.home)
    arguments.home = Path(arguments.home).expanduser().absolute() if arguments.home else default_home()
    return verb, arguments


def verb_parser(verb: Verb) -> Parser:
    parser = Parser(prog=f"orc {verb.name}", description=verb.summary, epilog=verb.epilog or None)
    verb.define(parser)
    _global_options(parser)
    return parser


def _choose(words: Sequence[str]) -> tuple[Verb, list[str]]:
    first, both = words[0], " ".join(words[:2])
    if both in BY_NAME:
        return BY_NAME[both], list(words[2:])
    if first in BY_NAME and not (first in GROUPS and _is_meant_for_a_verb(words[1:2])):
        return BY_NAME[first], list(words[1:])
    if first not in GROUPS:
        known = dict.fromkeys((*BY_NAME, *GROUPS))
        raise UsageError(
            f"there is no verb {first!r}.{text.did_you_mean(text.nearest(first, known))}", "`orc --help` lists them."
        )
    options = [verb.name.split()[1] for verb in VERBS if verb.name.startswith(f"{first} ")]
    second = words[1] if len(words) > 1 else ""
    if second in ("--help", "-h"):
        print(overview(first))
        raise SystemExit(0)
    near = text.did_you_mean(text.nearest(second, options))
    what = f"there is no verb '{first} {second}'.{near}" if second else f"{first} what?"
    raise UsageError(what, f"usage: orc {first} {{{'|'.join(options)}}} …")


def _is_meant_for_a_verb(words: Sequence[str]) -> bool:
    """`orc sweep resum` is a slip, `orc sweep lr=1` and `orc sweep ~key` are none."""
    return bool(words) and "=" not in words[0] and not words[0].startswith(("-", "~", "+"))


def overview(group: str = "") -> str:
    """The text of `orc --help`, or only the verbs of one group."""
    verbs = [verb for verb in VERBS if not group or verb.name.split()[0] == group]
    lines = [f"usage: orc [--json] [--home DIR] [--debug] {group or 'VERB'} …"]
    for topic in dict.fromkeys(verb.topic for verb in verbs):
        lines += ["", f"{topic}:"] + [f"  {verb.name:<18} {verb.summary}" for verb in verbs if verb.topic == topic]
    lines += [
        "",
        "everywhere:",
        "  --json             one JSON document on stdout, messages on stderr",
        "  --home DIR         the data directory (default: $ORC_HOME, else ~/.orc)",
        "  --debug            show tracebacks",
        "",
        "`orc VERB --help` tells more. Exit codes: 0 done, 1 it failed, 2 a mistake in the command, 130 interrupted.",
    ]
    return "\n".join(lines)
