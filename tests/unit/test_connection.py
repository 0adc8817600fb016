"""A job that asks for other servers than the stack has is refused, by key and with the way out."""

from __future__ import annotations

import pytest

from orchestrator.config import Settings
from orchestrator.errors import ConfigError
from orchestrator.execution.connection import check_stack
from orchestrator.stack import Stack

STACK = Stack(home="/h", database_url="postgresql+psycopg://me:pw@db/orc", ray_address="127.0.0.1:6379")


def test_a_job_that_names_nothing_or_the_same_fits() -> None:
    settings = Settings()
    check_stack(settings, STACK)
    settings.database.url = STACK.database_url
    settings.ray.address = "127.0.0.1:6379"
    check_stack(settings, STACK)


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("database", "url", "postgresql+psycopg://me:pw@other/orc"),
        ("ray", "address", "10.0.0.1:6379"),
        ("mlflow", "tracking_uri", "http://10.0.0.1:5000"),
        ("mlflow", "enabled", "true"),
    ],
)
def test_another_server_is_refused_by_name_and_without_passwords(group: str, name: str, value: str) -> None:
    settings = Settings()
    section = getattr(settings, group)
    setattr(section, name, type(getattr(section, name))(value))
    with pytest.raises(ConfigError) as refusal:
        check_stack(settings, STACK)
    assert f"{group}.{name}" in str(refusal.value)
    assert f"orc up {group}.{name}=" in str(refusal.value)
    assert "pw" not in str(refusal.value)
