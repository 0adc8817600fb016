"""`orc submit`: the command of `orc run` or `orc sweep` as a Ray job. What can be refused is refused before sending."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import orchestrator
from orchestrator import config
from orchestrator.account import user_name
from orchestrator.catalog import open_catalog
from orchestrator.cli.configs import composed
from orchestrator.cli.output import Output
from orchestrator.config import Job, Resume, looks_secret, redact_text
from orchestrator.config.redaction import redact_value
from orchestrator.errors import ConfigError, UserError
from orchestrator.execution import submission, upload
from orchestrator.execution.submission import Follower, JobServer, JobState, Submission
from orchestrator.provenance.record import told_to_jobs
from orchestrator.provenance.tree import is_secret_file
from orchestrator.stack import Stack
from orchestrator.store.names import run_id
from orchestrator.sweeps.template import template

KINDS = {"run": "train", "train": "train", "sweep": "sweep", "resume": "resume"}
"""What can be submitted, and the word for it of `python -m orchestrator.launch`."""

VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*['\"]?([A-Za-z_]\w*)")


def submit(arguments: argparse.Namespace, output: Output) -> int:
    """Exit codes: those of `submission.exit_code`; 2 when something is refused; 130 when ctrl-C ends the following,
    which leaves the job alone. With --detach 0 as soon as the job is taken.
    """
    kind, arguments.overrides = chosen_kind(arguments.overrides)
    directory = Path(arguments.working_dir).expanduser().resolve()
    if not directory.is_dir():
        raise UserError(f"--working-dir {arguments.working_dir}: there is no such directory.")
    if arguments.id and not submission.is_job_id(arguments.id):
        hint = "Use letters, digits, dots, dashes and underscores, at most 100."
        raise ConfigError("--id", arguments.id, "is no id of a job.", hint)
    address, variables = submission.job_server(arguments.address, os.environ, Stack.find(arguments.home))
    os.environ.update(variables)  # before the user's module is imported, which may import ray
    resumed = _resumed(kind, arguments, directory)
    job, config_dir = (resumed, "") if resumed else _checked(kind, arguments, directory)
    overrides = list(arguments.overrides)
    if not job.settings.run.user and not resumed:  # the job itself runs under the cluster's account
        overrides.append(f"run.user={json.dumps(user_name(), ensure_ascii=False)}")
    forwarded = forwarded_variables([*job.settings.submit.env, *arguments.env], os.environ)
    _note_variables(job, arguments.overrides, forwarded, output)
    exclude = [*job.settings.submit.exclude, *arguments.exclude]
    files = [] if arguments.in_place else upload.selected(directory, exclude, [arguments.home])
    upload.check_names(directory, files, Path(orchestrator.__file__).parent)
    size = upload.check_size(directory, files, job.settings.submit.max_mb)
    if private := [file.path for file in files if is_secret_file(file.path)]:
        output.message(f"note: {', '.join(private[:5])} would be sent, too; to keep it here: --exclude {private[0]}")

    server = JobServer(address)
    # With `resume: auto` only the cluster knows which run it will be.
    run = "" if resumed or job.settings.run.resume is Resume.auto else run_id(time.time())
    command = entrypoint(kind, overrides, run=run, base=arguments.base or "", config_dir=config_dir)
    if arguments.in_place:
        command = f"cd {shlex.quote(str(directory))} && {command}"
    with tempfile.TemporaryDirectory(prefix="orc-submit-") as scratch:
        archive = Path(scratch) / "project.zip"
        code = upload.pack(directory, files, archive) if files else ""
        metadata = _metadata(job, overrides[-1] if resumed else run, code)
        id = arguments.id or run or f"orc-{run_id(time.time())}"
        state = server.job(id) if arguments.id else None
        if state is not None:
            _check_same(state, metadata)
            output.message(f"job {id} exists already ({state.status}): nothing was sent")
        else:
            capacity = server.capacity()
            if capacity is not None:
                config.check_resources(job.settings, capacity)
            packed = f", {upload.megabytes(archive.stat().st_size)} packed" if files else ""
            what = f"{len(files)} files, {upload.megabytes(size)}{packed}" if files else "no files"
            output.message(f"sending {what}, to {address}")
            wanted = Submission(
                id=id,
                entrypoint=command,
                metadata=metadata,
                environment={**told_to_jobs(directory, os.environ), **forwarded},
                archive=archive if files else None,
            )
            state = _sent(server, wanted, output)
    return _ended(server, state, arguments, output)


def chosen_kind(words: Sequence[str]) -> tuple[str, list[str]]:
    """The kind of job, which may be the first word, and the other words."""
    if words and words[0] in KINDS:
        return KINDS[words[0]], list(words[1:])
    return KINDS["run"], list(words)


def entrypoint(kind: str, overrides: Sequence[str], *, run: str = "", base: str = "", config_dir: str = "") -> str:
    """The job's shell command. It repeats the overrides: secrets are looked up where the job runs."""
    words = ["python", "-m", "orchestrator.launch", kind, *overrides]
    for option, value in (("--config-dir", config_dir), ("--from", base), ("--run-id", run)):
        words += [option, value] if value else []
    return shlex.join(words)


def forwarded_variables(names: Iterable[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that travel with the job. Raises UserError for one that is not set here, or holds a secret."""
    found = {}
    for name in dict.fromkeys(names):
        if name not in environment:
            raise UserError(f"--env {name}: there is no such environment variable here. Set it: export {name}=…")
        value = environment[name]
        if looks_secret(name) or redact_text(value) != value:
            raise UserError(
                f"--env {name}: this looks like a secret, and Ray shows a job's variables to everybody who may list"
                f" jobs, and writes them to its logs. Set {name} in the environment of the cluster's nodes instead"
                " (before `orc up` or `ray start`): jobs inherit it."
            )
        found[name] = value
    return found


def check_no_secret(overrides: Iterable[str]) -> None:
    """Refuses a secret in the words that become the job's command, which everybody can read who may list jobs."""
    for word in overrides:
        key, _, value = word.partition("=")
        key = key.lstrip("+~")
        if redact_value(key, value) != value:
            why = "is a secret, and a job's command can be read by everybody who may list jobs."
            hint = f"Let the job look it up where it runs: {key}='${{oc.env:NAME}}'."
            raise ConfigError(key, None, why, hint)


def _resumed(kind: str, arguments: argparse.Namespace, directory: Path) -> Job | None:
    """The stored configuration of a run or sweep that shall go on (`orc submit resume RUN`, `orc submit sweep resume
    S`); None: it is something else. The job is told the id, because `last` may be another one when it starts."""
    words = arguments.overrides
    if kind == KINDS["resume"]:
        if len(words) != 1:
            raise UserError("Which run? Write: orc submit resume RUN")
        with open_catalog(arguments.home) as catalog:
            stored = catalog.run(words[0])
        arguments.overrides = [stored.run]
        with contextlib.chdir(directory):
            return config.compose((), base=stored.config)
    if kind != KINDS["sweep"] or words[:1] != ["resume"]:
        return None
    if len(words) != 2:
        raise UserError("Which sweep? Write: orc submit sweep resume SWEEP")
    with open_catalog(arguments.home) as catalog:
        sweep = catalog.sweep(words[1]).sweep
        stored = catalog.run(sweep)
    arguments.overrides = ["resume", sweep]
    return template((), base=stored.config, keeps_sweep=True)[0].base


def _checked(kind: str, arguments: argparse.Namespace, directory: Path) -> tuple[Job, str]:
    """The config as the job will compose it, and --config-dir as seen from the working directory."""
    check_no_secret(arguments.overrides)
    if arguments.base:
        with open_catalog(arguments.home) as catalog:
            arguments.base = catalog.run(arguments.base).run  # `last` may be another one when the job starts
    inside = ""
    if arguments.config_dir:
        absolute = Path(arguments.config_dir).expanduser().resolve()
        if not absolute.is_relative_to(directory):
            why = f"lies outside of {directory}, so it would not be sent."
            raise ConfigError(
                "--config-dir", arguments.config_dir, why, "Move it there, or choose --working-dir above it."
            )
        arguments.config_dir, inside = str(absolute), absolute.relative_to(directory).as_posix()
    if arguments.name:
        arguments.overrides.append(f"run.name={json.dumps(arguments.name, ensure_ascii=False)}")
    with contextlib.chdir(directory):
        return (_swept(arguments) if kind == KINDS["sweep"] else composed(arguments)), inside


def _swept(arguments: argparse.Namespace) -> Job:
    base = None
    if arguments.base:
        with open_catalog(arguments.home) as catalog:
            base = catalog.run(arguments.base).config
    config_dir = Path(arguments.config_dir) if arguments.config_dir else None
    return template(arguments.overrides, config_dir=config_dir, base=base)[0].base


def _note_variables(job: Job, overrides: Sequence[str], forwarded: Mapping[str, str], output: Output) -> None:
    names = {name for text in (*overrides, json.dumps(job.resolved)) for name in VARIABLE.findall(text)}
    if missing := sorted(names - set(forwarded)):
        output.message(f"note: the job reads {', '.join(missing)} from the environment of the cluster, not from here")


def _metadata(job: Job, run: str, code: str) -> dict[str, str]:
    """What Ray's job list says of the job; the driver's own record agrees."""
    settings = job.settings.run
    told = {
        "orc.run": run,
        "orc.name": settings.name,
        "orc.experiment": settings.experiment,
        "orc.user": settings.user or user_name(),
        "orc.config": job.hash[:12],
        "orc.code": code[:12],
    }
    return {key: value for key, value in told.items() if value}


def _check_same(state: JobState, metadata: Mapping[str, str]) -> None:
    """An id stands for one job: the same config, and the same code."""
    for key, what in (("orc.config", "config"), ("orc.code", "code")):
        if state.metadata.get(key, "") != metadata.get(key, ""):
            raise UserError(
                f"job {state.id} exists already ({state.status}), with another {what}. Choose another --id to start"
                f" this one; `ray job logs {state.id}` shows that one."
            )


def _sent(server: JobServer, wanted: Submission, output: Output) -> JobState:
    try:
        return server.submit(wanted, output.message)
    except KeyboardInterrupt:
        output.message(
            f"interrupted while sending: job {wanted.id} may have been taken. `ray job status {wanted.id}` tells,"
            f" `ray job stop {wanted.id}` ends it."
        )
        raise


def _ended(server: JobServer, state: JobState, arguments: argparse.Namespace, output: Output) -> int:
    """Follows the job, unless detached, and says how it stands."""
    run = state.metadata.get("orc.run", "")
    code = 0
    if not arguments.detach:
        output.message(f"job {state.id}" + (f", run {run}" if run and run != state.id else ""))
        follower = Follower(server, state, output.message)
        stream = output.stderr if output.as_json else output.stdout
        try:
            for text in follower:
                stream.write(text)
                stream.flush()
            code = submission.exit_code(follower.state)
        except KeyboardInterrupt:
            code = submission.INTERRUPTED
            stop = f"`orc cancel {run}`" if run else f"`ray job stop {state.id}`"
            output.message(f"\njob {state.id} goes on; {stop} stops it")
        state = follower.state
    document = {
        "run": run,
        "job": state.id,
        "status": state.status,
        "exit_code": state.exit_code,
        "experiment": state.metadata.get("orc.experiment", ""),
        "address": server.address,
    }
    output.result(document, lambda: _render(state, run, output))
    return code


def _render(state: JobState, run: str, output: Output) -> None:
    """The job's own output has told how the run went; this adds what it could not tell."""
    output.line(f"job {state.id} {state.status}")
    never_began = state.status == "FAILED" and state.exit_code is None
    watch, stop = (f"orc logs {run} --follow", f"orc cancel {run}") if run else ("", f"ray job stop {state.id}")
    going_on = [
        ("run", run),
        ("watch", " or ".join(word for word in (watch, f"ray job logs --follow {state.id}") if word)),
        ("show", f"orc show {run or 'last'}"),
        ("stop", stop),
    ]
    output.fields([("why", state.message)] if never_began else [] if state.is_over else going_on, indent="  ")
