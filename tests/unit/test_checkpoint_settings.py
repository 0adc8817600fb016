"""What the settings of checkpoints say, and which of them make no sense."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from orchestrator.checkpoints.job import BestRule, KeepRules
from orchestrator.checkpoints.keeping import keep_rules
from orchestrator.checkpoints.policy import CheckpointPolicy, Direction, also_best, label_of
from orchestrator.config.settings import CheckpointsConfig
from orchestrator.errors import ConfigError, UserError


def test_the_configuration_and_the_policy_have_the_same_fields_and_defaults() -> None:
    config = {field.name for field in fields(CheckpointsConfig)}
    assert config == {field.name for field in fields(CheckpointPolicy)}
    assert CheckpointPolicy(**asdict(CheckpointsConfig())) == CheckpointPolicy()


def test_what_is_kept_is_the_union_of_all_rules() -> None:
    policy = CheckpointPolicy(
        keep_last=5, best_metric="accuracy", keep_best=2, also_best=["val/loss:min", "f1"], keep_every_steps=1000,
        keep_hours=0.5, quota_gb=1.5,
    )  # fmt: skip
    assert keep_rules(policy) == KeepRules(
        last=5,
        best=(
            BestRule(metric="accuracy", direction=Direction.max, count=2),
            BestRule(metric="val/loss", direction=Direction.min, count=1),
            BestRule(metric="f1", direction=Direction.max, count=1),
        ),
        every_steps=1000,
        for_seconds=1800.0,
        quota_bytes=1_500_000_000,
    )


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("val/loss:min:3", ("val/loss", Direction.min, 3)),
        ("val/loss:min", ("val/loss", Direction.min, 1)),
        ("accuracy", ("accuracy", Direction.max, 1)),
    ],
)
def test_a_metric_whose_best_are_kept_is_written_short(text: str, meaning: tuple[str, Direction, int]) -> None:
    assert also_best(text) == meaning
    CheckpointsConfig(also_best=[text])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("also_best", ["loss:low"]),
        ("also_best", ["loss:min:0"]),
        ("also_best", [""]),
        ("label", "v{time}"),
        ("label", "v{"),
        ("label", "{}"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=setting):
        CheckpointPolicy(**{setting: value})
    with pytest.raises(ConfigError, match=f"checkpoints.{setting}"):
        CheckpointsConfig(**{setting: value})


@pytest.mark.parametrize(("setting", "value"), [("mode", "lazy"), ("window_mb", 0)])
def test_what_the_configuration_checks_by_its_types_a_script_hears_as_well(setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"checkpoints.{setting}"):
        CheckpointPolicy(**{setting: value})


def test_a_label_knows_how_far_it_is() -> None:
    assert label_of("a{attempt}-{epoch:03d}-{step}", epoch=7, step=1200, attempt=2) == "a2-007-1200"
