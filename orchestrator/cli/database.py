"""`orc db status|upgrade|backup|restore`."""

from __future__ import annotations

import argparse
from pathlib import Path

from orchestrator.cli import text
from orchestrator.cli.output import Output
from orchestrator.errors import UserError
from orchestrator.stack import Stack
from orchestrator.store import migrate
from orchestrator.store.store import Store


def status(arguments: argparse.Namespace, output: Output) -> int:
    """Exit code 1 when the schema is not the one that this version needs."""
    url = Stack.load(arguments.home).database_url
    schema = migrate.status(url)
    store = Store(url, pool_size=1)
    try:
        server, latency = store.ping()
    finally:
        store.close()
    verdict = (
        "current" if schema.is_current else "newer than this version" if schema.is_newer else "run `orc db upgrade`"
    )

    def render() -> None:
        output.fields(
            [
                ("database", store.address),
                ("server", f"PostgreSQL {server}, {latency * 1000:.1f} ms"),
                ("schema", f"{schema.found or 'none'} ({verdict})"),
            ]
        )

    document = {"address": store.address, "server": server, "latency_ms": latency * 1000, "schema": schema}
    output.result(document, render)
    return 0 if schema.is_current else 1


def upgrade(arguments: argparse.Namespace, output: Output) -> int:
    url = Stack.load(arguments.home).database_url
    before = migrate.status(url).found
    now = migrate.upgrade(url).found
    said = f"schema {now}: nothing to do" if before == now else f"schema {before or 'none'} -> {now}"
    output.result({"before": before, "now": now}, lambda: output.line(said))
    return 0


def backup(arguments: argparse.Namespace, output: Output) -> int:
    if Path(arguments.file).expanduser().exists():
        raise UserError(f"{arguments.file} exists already; a backup never replaces a file. Choose another name.")
    file = migrate.backup(Stack.load(arguments.home).database_url, arguments.file)
    size_bytes = file.stat().st_size
    document = {"file": file, "size_bytes": size_bytes}
    output.result(document, lambda: output.line(f"{file}  {text.size(size_bytes)}"))
    return 0


def restore(arguments: argparse.Namespace, output: Output) -> int:
    schema = migrate.restore(Stack.load(arguments.home).database_url, arguments.file, force=arguments.force)
    more = "" if schema.is_current else "; now run `orc db upgrade`"
    output.result(
        {"file": arguments.file, "schema": schema}, lambda: output.line(f"restored, schema {schema.found}{more}")
    )
    return 0
