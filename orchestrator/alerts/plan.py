"""From a run's settings to what its tracker is told: `RunSpec.alerts`. Pure.

    {"rules": {name: {…}}, "defaults": true, "channels": {name: {"kind": "slack", "options": {…}}},
     "all": [name, …], "job": [{"channel": name, "on": ["failure"]}]}

`rules` are as they were written, checked; `channels` are those that anything names. Nothing of it is secret but the
options of channels, which the tracker keeps in a file of its own (addresses.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.alerts.rules import DEFAULTS, parse_rules
from orchestrator.config.names import did_you_mean
from orchestrator.config.settings import AlertsConfig, EmailConfig, PagerdutyConfig, SlackConfig, WebhookConfig
from orchestrator.config.typed import build, dump, unknown_key
from orchestrator.errors import ConfigError

LOG = "log"
DEGRADED = "degraded"
COMPLETION, FAILURE = "completion", "failure"

VARIABLES: Mapping[tuple[str, str], str] = {
    ("slack", "webhook"): "ORC_SLACK_WEBHOOK",
    ("webhook", "url"): "ORC_WEBHOOK_URL",
    ("webhook", "token"): "ORC_WEBHOOK_TOKEN",
    ("pagerduty", "routing_key"): "ORC_PAGERDUTY_ROUTING_KEY",
    ("email", "password"): "ORC_SMTP_PASSWORD",
}
"""Environment variables that are read where an option is empty."""

_NEEDED: Mapping[str, Sequence[str]] = {
    "slack": ("webhook",), "webhook": ("url",), "pagerduty": ("routing_key",), "email": ("host", "to"), LOG: (),
}  # fmt: skip
_ADDRESS = {"slack": "webhook", "webhook": "url", "pagerduty": "routing_key", "email": "to"}
"""What `{NAME: ADDRESS}` means."""
_SCHEMAS: Mapping[str, type] = {
    "slack": SlackConfig, "webhook": WebhookConfig, "pagerduty": PagerdutyConfig, "email": EmailConfig,
}  # fmt: skip
KINDS = (LOG, *_SCHEMAS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """Whom to tell, and how. Example: Channel(kind="log")."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Of the kind's section in `alerts`, looked up and checked. Secret."""


def planned(alerts: AlertsConfig, notify: Sequence[Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """`RunSpec.alerts`; {} where nothing differs from the defaults. Raises ConfigError, before a run exists."""
    plan = _Plan(alerts, environ)
    job = [plan.told(item, f"notify[{at}]") for at, item in enumerate(notify)]
    if not alerts.enabled:
        rules: dict[str, Any] = {}
        everyone: list[str] = []
    else:
        rules = dict(alerts.rules)
        everyone = [plan.told(item, f"alerts.notify[{at}]")[0] for at, item in enumerate(alerts.notify)]
        for rule in parse_rules(rules, defaults=alerts.defaults):
            for name in rule.notify or ():
                plan.told(name, f"alerts.rules.{rule.name}.notify")
        if alerts.defaults and DEGRADED not in rules:
            told = [plan.told(item, f"alerts.administrators[{at}]")[0] for at, item in enumerate(alerts.administrators)]
            rules[DEGRADED] = {**DEFAULTS[DEGRADED], "notify": told}
    if alerts == AlertsConfig() and not job:
        return {}
    return {
        "rules": rules,
        "defaults": alerts.enabled and alerts.defaults,
        "channels": {name: dataclasses.asdict(channel) for name, channel in plan.channels.items()},
        "all": everyone,
        "job": [{"channel": name, "on": on} for name, on in job],
    }


def channels_to_test(
    alerts: AlertsConfig, notify: Sequence[Any], environ: Mapping[str, str], names: Sequence[str]
) -> dict[str, Channel]:
    """Of these notifiers, or of all that the configuration names anywhere. Raises ConfigError."""
    plan = _Plan(alerts, environ)
    if names:
        for name in names:
            plan.told(name, name)
        return plan.channels
    found = planned(alerts, notify, environ) or {"channels": {LOG: {"kind": LOG, "options": {}}}}
    return {name: Channel(**raw) for name, raw in found["channels"].items()}


class _Plan:
    """Collects the channels that are named."""

    def __init__(self, alerts: AlertsConfig, environ: Mapping[str, str]) -> None:
        self._alerts, self._environ = alerts, environ
        self.channels: dict[str, Channel] = {}

    def told(self, item: Any, key: str) -> tuple[str, list[str]]:
        """Name of the channel that an item means, and of which ends of a job it is told."""
        kind, given = _taken_apart(item, key)
        on = _ends(given.pop("on", None), f"{key}.on")
        options = self._options(kind, given, key)
        name = self._named(kind, Channel(kind=kind, options=options))
        return name, on

    def _options(self, kind: str, given: Mapping[str, Any], key: str) -> dict[str, Any]:
        if kind == LOG:
            if given:
                raise ConfigError(f"{key}.{next(iter(given))}", None, "log has no such option.")
            return {}
        options = dump(getattr(self._alerts, kind))
        for name in given.keys() - options.keys():  # without its value, which may be an address
            raise unknown_key(f"{key}.{name}", None, [f"{key}.{known}" for known in options])
        options |= given
        if kind == "email" and isinstance(options.get("to"), str):
            options["to"] = [each.strip() for each in options["to"].split(",") if each.strip()]
        for (of, name), variable in VARIABLES.items():
            if of == kind and not options.get(name):
                options[name] = self._environ.get(variable, "")
        checked = dump(build(_SCHEMAS[kind], options, key=f"alerts.{kind}"))
        for name in _NEEDED[kind]:
            if not checked[name]:
                hint = f"Give it: alerts.{kind}.{name}=…"
                variable = VARIABLES.get((kind, name), "")
                hint += f", best as '${{oc.env:NAME}}', or set the environment variable {variable}." if variable else ""
                raise ConfigError(
                    f"alerts.{kind}.{name}", None, f"{kind} is to be told ({key}) and has no {name}.", hint
                )
        for name in ("url", "webhook"):
            if name in checked and not str(checked[name]).startswith(("https://", "http://")):
                raise ConfigError(f"alerts.{kind}.{name}", None, "is no URL that begins with https:// or http://.")
        return checked

    def _named(self, kind: str, channel: Channel) -> str:
        """The kind, with a number where it has several addresses."""
        number = 1
        while True:
            name = kind if number == 1 else f"{kind}-{number}"
            if self.channels.setdefault(name, channel) == channel:
                return name
            number += 1


def _taken_apart(item: Any, key: str) -> tuple[str, dict[str, Any]]:
    if isinstance(item, str):
        kind, given = item, {}
    elif isinstance(item, Mapping) and len(item) == 1:
        kind, value = next((str(name), value) for name, value in item.items())
        if isinstance(value, Mapping):
            given = {str(name): each for name, each in value.items()}
        else:
            given = {} if value in (None, "", True) else {_ADDRESS.get(kind, "address"): value}
    elif item == {}:
        why = "had an address, and a stored configuration holds no secrets."
        raise ConfigError(
            key, None, why, "Give it again, best as notify=[{webhook: '${oc.env:NAME}'}]; [] tells nobody."
        )
    else:
        raise ConfigError(key, None, "names no notifier.", f"Write one of {', '.join(KINDS)}, or {{webhook: URL}}.")
    if kind not in KINDS:
        near = did_you_mean(kind, KINDS, cutoff=0.5) or f"There are {', '.join(KINDS)}."
        raise ConfigError(key, None if "://" in kind else kind, "there is no such notifier.", near)
    return kind, given


def _ends(given: Any, key: str) -> list[str]:
    words = [COMPLETION, FAILURE] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(words, Sequence) or not words or not all(word in (COMPLETION, FAILURE) for word in words):
        raise ConfigError(key, given, f"must be {COMPLETION}, {FAILURE} or a list of them.")
    return list(words)
