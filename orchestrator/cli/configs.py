"""`orc config show|diff|validate`, and how the words of a command become a checked config."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from orchestrator import config
from orchestrator.catalog import open_catalog
from orchestrator.cli.output import Output
from orchestrator.config import Job


def composed(arguments: argparse.Namespace, *, name: str | None = None, needs_train: bool = True) -> Job:
    """The config that `key=value` words, --config-dir, --from and --name ask for. Raises ConfigError."""
    overrides = list(arguments.overrides)
    if name:
        overrides.append(f"run.name={json.dumps(name, ensure_ascii=False)}")
    base = None
    if arguments.base:
        with open_catalog(arguments.home) as catalog:
            base = catalog.run(arguments.base).config
    return config.compose(overrides, config_dir=_directory(arguments.config_dir), base=base, needs_train=needs_train)


def show(arguments: argparse.Namespace, output: Output) -> int:
    job = composed(arguments, needs_train=False)
    document = {"config": job.resolved, "hash": job.hash, "sources": job.sources}
    output.result(document, lambda: output.line(config.render(job, "yaml").rstrip()))
    return 0


def validate(arguments: argparse.Namespace, output: Output) -> int:
    """Of a configuration that searches, the plan of the sweep is shown, too."""
    if _is_sweep(arguments):
        return _validate_sweep(arguments, output)
    job = composed(arguments)
    document = {"valid": True, "train": job.train, "hash": job.hash, "params": job.params}
    output.result(document, lambda: output.line(f"valid: {job.train}, config {job.hash[:12]}"))
    return 0


def _is_sweep(arguments: argparse.Namespace) -> bool:
    """Whether `orc sweep` would find something to search in it: on the command line, or in the files that it names."""
    from orchestrator.config.composition import draft
    from orchestrator.sweeps.template import is_searched

    if any(is_searched(word) for word in arguments.overrides):
        return True
    if arguments.base:  # of a stored configuration the sweep section is not taken over
        return False
    return bool(draft(arguments.overrides, config_dir=_directory(arguments.config_dir)).space)


def _validate_sweep(arguments: argparse.Namespace, output: Output) -> int:
    """Without asking a cluster how much room it has; `orc sweep --dry-run` does."""
    from orchestrator.cli import sweep, sweep_plan

    made, plan = sweep.planned(arguments, ask_cluster=False)
    job = made.base
    document = {"valid": True, "train": job.train, "hash": job.hash, "params": job.params}

    def render() -> None:
        output.line(f"valid: a sweep of {job.train}")
        sweep_plan.render(plan, output)

    output.result({**document, "sweep": sweep_plan.document(plan)}, render)
    return 0


def diff(arguments: argparse.Namespace, output: Output) -> int:
    """The second side is a run when it is one word without `=`, else what the overrides compose to."""
    with open_catalog(arguments.home) as catalog:
        first = catalog.run(arguments.first).config
        is_run = (
            len(arguments.second) == 1 and "=" not in arguments.second[0] and not arguments.second[0].startswith("~")
        )
        if is_run:
            second = catalog.run(arguments.second[0]).config
    if not is_run:
        directory = _directory(arguments.config_dir)
        second = config.compose(arguments.second, config_dir=directory, needs_train=False).resolved
    changes = config.diff(first, second)

    def render() -> None:
        if not changes:
            output.line("no difference")
            return
        output.table(("key", "first", "second"), [(row.key, _shown(row.old), _shown(row.new)) for row in changes])

    # A key that one side lacks has no old or no new value in the document.
    sides = [{"key": row.key, "old": row.old, "new": row.new} for row in changes]
    output.result([{k: v for k, v in side.items() if v is not config.ABSENT} for side in sides], render)
    return 0


def _shown(value: object) -> str:
    return str(value) if value is config.ABSENT else json.dumps(value, ensure_ascii=False)


def _directory(given: str | None) -> Path | None:
    return Path(given) if given else None
