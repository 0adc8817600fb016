"""`orc alerts ls|test`: what fires now, what could not be told, and whether notifiers work."""

from __future__ import annotations

import argparse
import os
import socket
import time
import uuid
from dataclasses import replace

from orchestrator.account import user_name
from orchestrator.alert_records import AlertRow, Notice, NotSent
from orchestrator.alerts.plan import KINDS, LOG, channels_to_test
from orchestrator.backends import send_notice
from orchestrator.cli import configs, text
from orchestrator.cli.access import asked_catalog
from orchestrator.cli.output import Output
from orchestrator.cli.parser import UsageError


def ls(arguments: argparse.Namespace, output: Output) -> int:
    with asked_catalog(arguments) as catalog:
        run = catalog.run(arguments.run).run if arguments.run else None
        rows = catalog.alerts(run, only_firing=not arguments.all)
        unsent = catalog.notifications(run)
    now = time.time()

    def render() -> None:
        if rows:
            header = ("state", "rule", "metric", "value", "since", "run", "message")
            output.table(header, [_cells(row, now) for row in rows], right=(3, 4), optional=("metric", "value"))
        else:
            output.line("no alerts" if arguments.all else "nothing fires")
        if unsent:
            output.line()
            output.table(
                ("state", "notifier", "tries", "about", "why"),
                [(row.state, row.notifier, str(row.tries), row.title, row.error) for row in unsent],
                right=(2,),
                title="not told",
            )

    output.result(
        {"alerts": [text.jsonable(row) for row in rows], "not_told": [text.jsonable(row) for row in unsent]}, render
    )
    return 0


def _cells(row: AlertRow, now: float) -> tuple[str, ...]:
    since = row.fired_at if row.is_firing or row.resolved_at is None else row.resolved_at
    return (
        "firing" if row.is_firing else "over",
        row.rule,
        row.key,
        text.number(row.value),
        text.age(now - since),
        row.run,
        row.message,
    )


def test(arguments: argparse.Namespace, output: Output) -> int:
    """Sends from here, at once, with the addresses that a run with this configuration and environment would have."""
    names = [word for word in arguments.words if "=" not in word]
    for name in names:
        if name not in KINDS:
            near = text.did_you_mean(text.nearest(name, KINDS))
            raise UsageError(f"there is no notifier {name!r}.{near} There are {', '.join(KINDS)}.")
    arguments.overrides, arguments.base = [word for word in arguments.words if "=" in word], None
    settings = configs.composed(arguments, needs_train=False).settings
    channels = channels_to_test(settings.alerts, settings.notify, os.environ, names)
    results = []
    for name, channel in channels.items():
        notice = _notice(name)
        began = time.monotonic()
        try:
            if channel.kind == LOG:
                output.message(f"orc: {notice.title}: {notice.message}")
            else:
                send_notice(channel.kind, channel.options, notice)
            if channel.kind == "pagerduty":  # nobody shall be called twice for a test
                send_notice(channel.kind, channel.options, replace(notice, kind="resolved"))
            why = ""
        except NotSent as error:
            why = error.why
        took = round(1000 * (time.monotonic() - began))
        results.append({"notifier": name, "kind": channel.kind, "ok": not why, "error": why, "wait_ms": took})

    def render() -> None:
        cells = [
            (str(each["notifier"]), "told" if each["ok"] else "failed", f"{each['wait_ms']} ms", str(each["error"]))
            for each in results
        ]
        output.table(("notifier", "state", "took", "why"), cells, right=(2,))

    output.result(results, render)
    return 0 if all(each["ok"] for each in results) else 1


def _notice(name: str) -> Notice:
    key = f"test/{uuid.uuid4().hex[:12]}"
    return Notice(
        key=key, subject=key, kind="test", level="info", at=time.time(), title="test of a notifier",
        message=f"{user_name()} on {socket.gethostname()} asked whether {name} works. Nothing is wrong.",
    )  # fmt: skip
