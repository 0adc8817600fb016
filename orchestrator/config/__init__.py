"""Configuration: Hydra composes it, dataclasses check it, everything below gets plain values.

The names that need Hydra are loaded when first used, so that processes that only read settings, build a train
function's `cfg` or redact a text stay light.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orchestrator.config.capacity import ClusterCapacity, NodeCapacity, check_resources, gangs
from orchestrator.config.functions import config_schema, load_failure_function, load_function
from orchestrator.config.identity import ABSENT, Change, canonical_json, config_hash, diff, flatten
from orchestrator.config.job import Job, render
from orchestrator.config.redaction import SecretFilter, looks_secret, redact, redact_text, redact_url
from orchestrator.config.section import Section, user_config
from orchestrator.config.settings import (
    CheckpointsConfig,
    DatabaseConfig,
    Direction,
    Enabled,
    FailuresConfig,
    MlflowConfig,
    Placement,
    ProvenanceConfig,
    RayConfig,
    ResourcesConfig,
    Resume,
    RunConfig,
    Settings,
    StopConfig,
    StorageConfig,
    SubmitConfig,
    SweepConfig,
    TrackingConfig,
)
from orchestrator.config.storage import check_storage, storage_location
from orchestrator.config.typed import build, dump

if TYPE_CHECKING:
    from orchestrator.config.composition import compose, from_hydra

__all__ = [
    "ABSENT",
    "Change",
    "CheckpointsConfig",
    "ClusterCapacity",
    "DatabaseConfig",
    "Direction",
    "Enabled",
    "FailuresConfig",
    "Job",
    "MlflowConfig",
    "NodeCapacity",
    "Placement",
    "ProvenanceConfig",
    "RayConfig",
    "ResourcesConfig",
    "Resume",
    "RunConfig",
    "SecretFilter",
    "Section",
    "Settings",
    "StopConfig",
    "StorageConfig",
    "SubmitConfig",
    "SweepConfig",
    "TrackingConfig",
    "build",
    "canonical_json",
    "check_resources",
    "check_storage",
    "compose",
    "config_hash",
    "config_schema",
    "diff",
    "dump",
    "flatten",
    "from_hydra",
    "gangs",
    "load_failure_function",
    "load_function",
    "looks_secret",
    "redact",
    "redact_text",
    "redact_url",
    "render",
    "storage_location",
    "user_config",
]


def __getattr__(name: str) -> Any:
    if name in ("compose", "from_hydra"):
        from orchestrator.config import composition

        return getattr(composition, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
