"""What a composed and checked configuration comes to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml

from orchestrator.config.identity import flatten
from orchestrator.config.settings import OURS, Settings
from orchestrator.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration that can run. Shows no secrets; `settings` and `user` hold them, for use."""

    train: str
    hash: str
    """SHA-256 of what is computed, see identity.py."""
    settings: Settings = field(repr=False)
    """Our keys, typed."""
    user: dict[str, Any] = field(repr=False)
    """The train function's keys, as plain values; `user_config(user, schema)` makes its `cfg` from them."""
    resolved: dict[str, Any] = field(repr=False)
    """Everything, as strict JSON, without secrets: what is stored, shown and hashed, and what `compose(base=…)` takes.
    Where a secret came from the environment stands `${oc.env:NAME}`, elsewhere `***`."""
    sources: list[str] = field(repr=False)
    """Where the values came from, lowest priority first."""
    secrets: tuple[str, ...] = field(repr=False, default=())
    """Every secret in clear, for `SecretFilter` and `redact_text`."""

    @property
    def params(self) -> dict[str, Any]:
        """The searchable flat form of the user's part, `optim.lr` -> 0.01, without secrets."""
        return flatten({name: value for name, value in self.resolved.items() if name not in OURS})


_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
"""libyaml's where it is there: a sweep writes a configuration per trial."""


def render(job: Job, format: str = "yaml") -> str:
    """The resolved configuration as text; `format` is yaml or json."""
    if format == "json":
        return json.dumps(job.resolved, indent=2, allow_nan=False)
    if format == "yaml":
        return yaml.dump(job.resolved, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=120)
    raise ConfigError("format", format, "must be one of yaml, json.")
