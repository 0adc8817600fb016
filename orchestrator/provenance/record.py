"""Writes down where an attempt comes from: `provenance/` in the run's directory, and values for the database.

Called by the driver once per attempt. Nothing here fails a run: what cannot be found out is noted under `missing`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.config import ProvenanceConfig, redact_text
from orchestrator.config.redaction import HIDDEN
from orchestrator.provenance import archive, system
from orchestrator.provenance.fingerprint import fingerprint
from orchestrator.provenance.git import SUBMITTED, Repository
from orchestrator.provenance.tree import is_secret_file, trees

logger = logging.getLogger(__name__)

MAX_DIFF_BYTES = 5_000_000
MOST_NAMES = 100
"""Changed and untracked files that are named; the rest is counted."""

_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What `record` found out and wrote."""

    values: dict[str, Any]
    """For a provenance fact: without the diff's text and the configuration."""
    files: tuple[Path, ...]
    """Written below the run's directory."""
    warnings: tuple[str, ...]
    """For the user: what may surprise."""


def record(
    directory: Path,
    *,
    attempt: int,
    config: Mapping[str, Any],
    config_hash: str,
    settings: ProvenanceConfig,
    code_paths: Sequence[str],
    environ: Mapping[str, str],
    secrets: Sequence[str] = (),
    seed: int = 0,
    resources: Callable[[], Mapping[str, Any]] = dict,
    outside: Sequence[str] = (),
    command: Sequence[str] | None = None,
) -> Recorded:
    """Writes `provenance/attempt-N.json`, `.diff` and `source-….tar.gz` below `directory`. Never raises.

    `code_paths`: where the user's code lies, the working directory first. `outside`: directories that hold results or
    services' data, never source. `resources` is asked once and may raise.
    """
    probes = _Probes()
    files: list[Path] = []
    place = directory / "provenance"
    probes.ask("directory", lambda: place.mkdir(parents=True, exist_ok=True), None)
    hidden = [Path(path) for path in (str(directory), *outside) if path]
    values: dict[str, Any] = {
        **probes.ask("host", system.host, {}),
        **probes.ask("python", system.python, {}),
        "pid": os.getpid(),
        "directory": _working_directory(),
        "command": [redact_text(word, secrets) for word in (sys.argv if command is None else command)],
        "seed": seed,
        "packages": probes.ask("packages", system.packages, {}),
        "cuda": probes.ask("cuda", system.cuda, {}),
        "container": probes.ask("container", lambda: system.container(environ), {}),
        "resources": probes.ask("resources", lambda: _plain(resources()), {}),
    }
    repository = probes.ask("git", lambda: _repository(code_paths, environ), None)
    values["git"] = probes.ask("git", lambda: _git(repository, environ), {})
    if repository is not None and values["git"]:
        diff = place / f"attempt-{attempt}.diff"
        values["git"] |= probes.ask("diff", lambda: _write_diff(repository, values["git"], diff, secrets), {})
        files += [diff] if values["git"].get("diff_file") else []
    written = None
    if settings.source:
        written = probes.ask(
            "source", lambda: _write_source(place, code_paths, environ, hidden, settings, secrets), None
        )
    values["source"] = written.document() if written else {}
    files += [written.file] if written else []
    values["git"] = _without_long_lists(values["git"])
    values["fingerprint"] = probes.ask("fingerprint", lambda: _fingerprint(config_hash, values), {})
    values["missing"] = probes.named(secrets)
    document = place / f"attempt-{attempt}.json"
    if probes.ask("document", lambda: _write_document(document, {**values, "config": config}), False):
        files.append(document)
    values["missing"] = probes.named(secrets)
    warnings = [written.warning()] if written else [values["missing"].get("source", "")]
    return Recorded(values=values, files=tuple(files), warnings=tuple(warning for warning in warnings if warning))


class _Probes:
    """Asks one thing after the other; one that fails does not hinder the next."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}

    def named(self, secrets: Sequence[str]) -> dict[str, str]:
        """What failed so far, and why."""
        return {name: redact_text(why, secrets) for name, why in self.missing.items()}

    def ask(self, name: str, question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except Exception as error:  # the border: whatever a probe meets must not end a run
            self.missing[name] = f"{error}" or type(error).__name__
            logger.info("provenance: %s is missing", name, exc_info=True)
            return otherwise


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # somebody removed it


def _repository(code_paths: Sequence[str], environ: Mapping[str, str]) -> Repository | None:
    """Of the first code path, which is the working directory."""
    return Repository.around(Path(os.path.realpath(code_paths[0])), environ) if code_paths else None


def _git(repository: Repository | None, environ: Mapping[str, str]) -> dict[str, Any]:
    if repository is None:
        told = json.loads(environ.get(SUBMITTED) or "{}")
        return dict(told) if isinstance(told, dict) else {}
    return submitted_git(repository)


def told_to_jobs(directory: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable by which a job that has no `.git` knows what git says here; none where git says nothing."""
    try:
        repository = Repository.around(Path(os.path.realpath(directory)), environ)
        return {} if repository is None else {SUBMITTED: json.dumps(_without_long_lists(submitted_git(repository)))}
    except Exception:  # the border: provenance must not hinder a job
        logger.info("provenance: git is missing", exc_info=True)
        return {}


def submitted_git(repository: Repository) -> dict[str, Any]:
    """What git says, with untracked files by name."""
    untracked = [listed.path for listed in repository.files() if not listed.is_tracked]
    return {**repository.state(), "untracked": untracked}


def _write_diff(repository: Repository, git: Mapping[str, Any], file: Path, secrets: Sequence[str]) -> dict[str, Any]:
    """Writes what differs from the commit, without files that hold secrets by their name."""
    paths = [path for path in git["changed"] if not is_secret_file(path)]
    if not git["commit"] or not paths:
        return {}
    data, is_cut = repository.diff(paths, most=MAX_DIFF_BYTES)
    if not data:
        return {}
    text = redact_text(_PRIVATE_KEY.sub(HIDDEN, data.decode("utf-8", "surrogateescape")), secrets)
    shown = text.encode("utf-8", "surrogateescape")
    _replace(file, shown)
    return {
        "diff_file": file.name,
        "diff_bytes": len(shown),
        "diff_sha256": hashlib.sha256(shown).hexdigest(),
        "diff_is_cut": is_cut,
    }


def _write_source(
    place: Path,
    code_paths: Sequence[str],
    environ: Mapping[str, str],
    hidden: Sequence[Path],
    settings: ProvenanceConfig,
    secrets: Sequence[str],
) -> archive.Archive:
    found = trees([Path(path) for path in code_paths], environ=environ, outside=hidden, exclude=settings.exclude)
    limits = archive.Limits(max_bytes=int(settings.max_mb * 1e6), max_file_bytes=int(settings.max_file_mb * 1e6))
    return archive.write(place, found, limits, secrets)


def _without_long_lists(git: Mapping[str, Any]) -> dict[str, Any]:
    short = dict(git)
    for name in ("changed", "untracked"):
        if isinstance(names := short.get(name), list):
            short[name] = names[:MOST_NAMES]
            short.setdefault(f"{name}_files", len(names))  # a job was told a list that was cut already
    return short


def _fingerprint(config_hash: str, values: Mapping[str, Any]) -> dict[str, str]:
    """Without `data`, which rank 0 adds when it declares datasets, and without `run`, which the store makes of all."""
    parts = fingerprint(
        config_hash=config_hash,
        git=values["git"],
        source=values["source"],
        datasets={},
        environment={
            "packages": values["packages"],
            "python": values.get("python", ""),
            "implementation": values.get("implementation", ""),
            "cuda": values["cuda"].get("torch", ""),
        },
    )
    return {name: parts[name] for name in ("config", "code", "environment") if parts[name]}


def _write_document(file: Path, document: Mapping[str, Any]) -> bool:
    _replace(file, (json.dumps(document, indent=2, default=str, allow_nan=False) + "\n").encode())
    return True


def _plain(value: Any) -> Any:
    """The value as strict JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _replace(file: Path, data: bytes) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
