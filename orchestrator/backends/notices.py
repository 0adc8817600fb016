"""What each notifier says about a notice. Pure: a notice in, plain values out.

Sources of the forms: Slack, "Sending messages using incoming webhooks" and "Block Kit: blocks"; PagerDuty, "Events API
v2: send an alert event". Both cut or refuse what is too long, so it is cut here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from orchestrator.alert_records import Notice

SOURCE = "ray-orchestrator"
GOOD = ("resolved", "completion")
_HEADER, _SECTION, _FIELD, _FIELDS = 150, 3000, 2000, 10
"""Slack's limits, in characters; and of fields in one section."""
_SUMMARY = 1024
"""PagerDuty's limit, in characters."""


def facts(notice: Notice) -> Iterator[tuple[str, str]]:
    """Name and value, for people; what is empty is left out."""
    named = {
        "run": notice.run_name, "id": notice.run, "experiment": notice.experiment,
        "attempt": str(notice.attempt) if notice.attempt > 1 else "",
        **{name: _shown(value) for name, value in notice.details.items()},
    }  # fmt: skip
    return ((name, value) for name, value in named.items() if value)


def slack(notice: Notice, channel: str = "") -> dict[str, Any]:
    """A message with blocks; `text` is what notifications of a phone show."""
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": _cut(notice.title, _HEADER), "emoji": False}}
    ]
    if notice.message:
        blocks.append({"type": "section", "text": {"type": "mrkdwn", "text": _cut(_escaped(notice.message), _SECTION)}})
    fields = [
        {"type": "mrkdwn", "text": _cut(f"*{_escaped(name)}*\n{_escaped(value)}", _FIELD)}
        for name, value in facts(notice)
    ]
    if fields:
        blocks.append({"type": "section", "fields": fields[:_FIELDS]})
    blocks.append(
        {"type": "context", "elements": [{"type": "mrkdwn", "text": f"{SOURCE} · {notice.kind} · {_when(notice.at)}"}]}
    )
    body = {"text": _cut(_escaped(notice.title), _SECTION), "blocks": blocks}
    return {**body, "channel": channel} if channel else body


def pagerduty(notice: Notice, routing_key: str) -> dict[str, Any]:
    """`trigger` or `resolve`. An alert and its end have the same `dedup_key`, so has whatever is sent again."""
    event: dict[str, Any] = {
        "routing_key": routing_key,
        "event_action": "resolve" if notice.kind in GOOD else "trigger",
        "dedup_key": _cut(notice.subject, 255),
        "client": SOURCE,
    }
    severity = {"error": "critical", "warning": "warning"}.get(notice.level, "info")
    event["payload"] = {
        "summary": _cut(f"{notice.title}: {notice.message}".removesuffix(": "), _SUMMARY),
        "source": notice.run_name or SOURCE,
        "severity": severity,
        "timestamp": _when(notice.at),
        "component": notice.experiment or SOURCE,
        "class": notice.kind,
        "custom_details": {"key": notice.key, **dict(facts(notice))},
    }
    return event


def webhook(notice: Notice) -> dict[str, Any]:
    """Everything, under names that stay."""
    return {
        "protocol": 1, "source": SOURCE, "key": notice.key, "subject": notice.subject, "kind": notice.kind,
        "level": notice.level, "title": notice.title, "message": notice.message, "time": _when(notice.at),
        "run": notice.run, "run_name": notice.run_name, "experiment": notice.experiment, "attempt": notice.attempt,
        "details": dict(notice.details),
    }  # fmt: skip


def mail(notice: Notice) -> tuple[str, str]:
    """Subject and text."""
    subject = " ".join(f"[orc] {notice.title}".split())
    width = max((len(name) for name, _ in facts(notice)), default=0)
    lines = [notice.message, ""] if notice.message else []
    lines += [f"{name.ljust(width)}  {value}" for name, value in facts(notice)]
    lines += ["", f"{notice.kind}, {_when(notice.at)}. `orc show {notice.run or 'last'}` tells more."]
    return _cut(subject, 200), "\n".join(lines) + "\n"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _escaped(text: str) -> str:
    """Slack's three."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _shown(value: Any) -> str:
    if value is None or value == "" or isinstance(value, Mapping):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
