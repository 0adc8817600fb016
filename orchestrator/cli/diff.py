"""`orc diff A B`: what differs between two runs, or two attempts. Exit codes as `diff` has them: 0 the same, 1 not, 2
trouble."""

from __future__ import annotations

import argparse
import json
import math
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from orchestrator import config
from orchestrator.backends.storage import Storage
from orchestrator.catalog import Catalog
from orchestrator.catalog.headline import is_automatic
from orchestrator.cli import describe, text
from orchestrator.cli.access import asked_catalog
from orchestrator.cli.origin import whole_provenance
from orchestrator.cli.output import Output
from orchestrator.errors import UserError
from orchestrator.provenance import archive, difference, summary
from orchestrator.provenance.fingerprint import complete, different
from orchestrator.store.views import AttemptRow, RunDetail

FILES_SHOWN = 20
WIDTH = 60
"""Characters of a value in a table."""
SAME, DIFFERENT = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One attempt, with what it came to."""

    run: RunDetail
    attempt: AttemptRow | None
    """None of a run that has not started yet."""
    metrics: Mapping[str, float]
    source_of: RunDetail | None = None
    """The run whose directory has its source archive; None: its own."""

    @property
    def number(self) -> int:
        return self.attempt.attempt if self.attempt else 0

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.attempt.provenance if self.attempt else {}

    @property
    def config(self) -> Mapping[str, Any]:
        return (self.attempt.config if self.attempt else {}) or self.run.config

    @property
    def fingerprint(self) -> dict[str, str]:
        known = self.provenance.get("fingerprint")
        config_hash = self.attempt.config_hash if self.attempt else self.run.config_hash
        return complete(known if isinstance(known, Mapping) else {}, config_hash)

    @property
    def title(self) -> str:
        return f"{self.run.name}@{self.number}"

    def document(self) -> dict[str, Any]:
        return {
            "run": self.run.run, "name": self.run.name, "attempt": self.number, "fingerprint": self.fingerprint,
            "code": summary.code_line(self.provenance),
        }  # fmt: skip


def diff(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        a, b = (side(catalog, reference) for reference in (arguments.first, arguments.second))
    document = compare(a, b, with_code=arguments.code)
    output.result(document, lambda: render(output, a, b, document))
    return SAME if document["same"] else DIFFERENT


def side(catalog: Catalog, reference: str) -> Side:
    """Of `RUN` (its newest attempt) or `RUN@2`. Raises NotFound, or UserError where there is no such attempt."""
    name, _, number = reference.rpartition("@")
    chosen = int(number) if name and number.isdecimal() else 0
    run = catalog.run(name if chosen else reference)
    attempts = {row.attempt: row for row in catalog.attempts(run.run)}
    if chosen and chosen not in attempts:
        there = ", ".join(map(str, attempts)) or "none"
        raise UserError(f"Run {run.name} has no attempt {chosen}. There are: {there}.")
    newest = max(attempts, default=0)
    rows = [row for row in describe.lowest_ranks(catalog.summaries(run.run)) if not is_automatic(row.key)]
    if chosen in (0, newest):
        # Of an attempt that was asked for, nothing that an earlier one said.
        metrics = {row.key: row.last for row in rows if not chosen or row.last_attempt == newest}
    else:
        found = {row.key: catalog.points(run.run, row.key, rank=row.rank, attempt=chosen).values for row in rows}
        metrics = {key: float(values[-1]) for key, values in found.items() if len(values)}
    attempt, other = attempts.get(chosen or newest), None
    if attempt is not None:
        provenance, other = whole_provenance(catalog, attempt)
        attempt = replace(attempt, provenance=provenance)
    return Side(run=run, attempt=attempt, metrics=metrics, source_of=other)


def compare(a: Side, b: Side, *, with_code: bool) -> dict[str, Any]:
    """The whole answer, as plain values. `same` is about what went in: the four parts of the fingerprint."""
    parts = different(a.fingerprint, b.fingerprint)
    old, new = a.provenance, b.provenance
    return {
        "same": set(parts.values()) == {"same"},
        "parts": parts,
        "a": a.document(),
        "b": b.document(),
        "config": difference.change_documents(config.diff(a.config, b.config)),
        "code": difference.change_documents(difference.code_changes(old, new)),
        "files": files(a, b, with_code=with_code),
        "data": difference.change_documents(difference.data_changes(old, new)),
        "packages": difference.package_changes(old, new),
        "system": difference.change_documents(difference.system_changes(old, new)),
        "metrics": [
            {"key": key, "a": a.metrics.get(key), "b": b.metrics.get(key)} for key in sorted({*a.metrics, *b.metrics})
        ],
    }


def files(a: Side, b: Side, *, with_code: bool) -> dict[str, Any]:
    """Changed source files, from the two archives; `patch` with the text. `unknown` says why nothing can be said."""
    names = [_archive(s) for s in (a, b)]
    if not all(names):
        missing = [s.title for s, name in zip((a, b), names, strict=True) if not name]
        return {"unknown": f"no source archive of {' and '.join(missing)}"}
    if a.provenance["source"].get("sha256") == b.provenance["source"].get("sha256"):
        return {"added": [], "removed": [], "changed": []}
    try:
        places = [Storage((s.source_of or s.run).directory) for s in (a, b)]
        seen = []
        for place, name in zip(places, names, strict=True):
            with place.open_input(name) as source:
                seen.append(archive.digests(source))
        changes: dict[str, Any] = difference.file_changes(*seen)
        if with_code:
            shown = sorted(name for group in changes.values() for name in group)
            texts = []
            for place, name in zip(places, names, strict=True):
                with place.open_input(name) as source:
                    texts.append(archive.texts(source, shown))
            changes["patch"] = [
                line
                for name in shown[:FILES_SHOWN]
                for line in difference.patch(name, texts[0].get(name, ""), texts[1].get(name, ""))
            ] + ([f"… {len(shown) - FILES_SHOWN} more files"] if len(shown) > FILES_SHOWN else [])
        return changes
    except (OSError, EOFError, UserError, tarfile.TarError) as error:
        return {"unknown": f"the source archives cannot be read ({error})"}


def _archive(s: Side) -> str:
    source = s.provenance.get("source")
    name = source.get("file", "") if isinstance(source, Mapping) else ""
    return f"provenance/{name}" if name and "/" not in str(name) else ""


def render(output: Output, a: Side, b: Side, document: Mapping[str, Any]) -> None:
    output.line(headline(document["parts"]), style="bold")
    titles = (a.title, b.title)
    for name in ("config", "code", "data", "system"):
        _changes(output, name, document[name], titles)
        if name == "code":
            _files(output, document["files"])
        if name == "data":
            _packages(output, document["packages"], titles)
    if document["metrics"]:
        output.line()
        rows = [(row["key"], text.number(row["a"]), text.number(row["b"]), _gap(row)) for row in document["metrics"]]
        output.table(("key", *titles, "change"), rows, right=(1, 2, 3), title="metrics")


def headline(parts: Mapping[str, str]) -> str:
    """Which parts of the fingerprint differ. Example: `differs: config, code · same: data, environment`."""
    groups = {verdict: [part for part in parts if parts[part] == verdict] for verdict in ("differs", "unknown", "same")}
    return " · ".join(f"{verdict}: {', '.join(members)}" for verdict, members in groups.items() if members)


def _changes(output: Output, name: str, rows: list[dict[str, Any]], titles: tuple[str, str]) -> None:
    if not rows:
        return
    output.line()
    cells = [(row["key"], *shortened(_shown(row, "a"), _shown(row, "b"))) for row in rows]
    output.table(("key", *titles), cells, title=name)


def _shown(row: Mapping[str, Any], side_name: str) -> str:
    if side_name not in row:
        return str(config.ABSENT)
    value = row[side_name]
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def shortened(a: str, b: str, width: int = WIDTH) -> tuple[str, str]:
    """Both on one line of that width; of long ones, from shortly before they differ."""
    a, b = (" ".join(value.split()) for value in (a, b))
    if max(len(a), len(b)) > width:
        begin = len(os.path.commonprefix([a, b])) - 15
        a, b = (f"…{value[begin:]}" if begin > 0 else value for value in (a, b))
    return text.one_line(a, width), text.one_line(b, width)


def _files(output: Output, found: Mapping[str, Any]) -> None:
    if "unknown" in found:
        output.line()
        output.line(f"files: {found['unknown']}")
        return
    rows = [
        (mark, name) for mark, group in (("-", "removed"), ("+", "added"), ("~", "changed")) for name in found[group]
    ]
    if rows:
        output.line()
        output.line("files", style="bold")
        for mark, name in rows[:FILES_SHOWN]:
            output.line(f"  {mark} {name}")
        if len(rows) > FILES_SHOWN:
            output.line(f"  … {len(rows) - FILES_SHOWN} more; --json names all")
    for line in found.get("patch", ()):
        output.line(line)


def _packages(output: Output, found: Mapping[str, Any], titles: tuple[str, str]) -> None:
    rows = [(name, version, "-") for name, version in found["removed"].items()]
    rows += [(name, "-", version) for name, version in found["added"].items()]
    rows += [(name, old, new) for name, (old, new) in found["changed"].items()]
    if rows:
        output.line()
        output.table(("package", *titles), sorted(rows), title="packages")


def _gap(row: Mapping[str, Any]) -> str:
    a, b = row["a"], row["b"]
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return ""
    return f"{b - a:+.4g}" if a != b else "="
