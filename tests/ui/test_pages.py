"""What a person sees who follows the links that `orc show` prints. Run by `make ui-test`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.plugins.own_stack import OwnStack
from tests.ui.browser import Browser

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def stack() -> Iterator[OwnStack]:
    with OwnStack() as stack:
        stack.orc("up")
        yield stack


@pytest.fixture(scope="module")
def story(stack: OwnStack) -> dict[str, Any]:
    """What `orc show` says of a finished run."""
    run = json.loads(stack.orc("run", "experiment=digits", "--json"))["run"]
    return json.loads(stack.orc("show", run, "--json"))


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


def test_mlflow_shows_the_run(story: dict[str, Any], browser: Browser) -> None:
    shown = browser.text(story["links"]["mlflow"], wanted=story["name"])
    assert "Finished" in shown


def test_the_dashboard_asks_for_the_token(story: dict[str, Any], browser: Browser) -> None:
    browser.text(story["links"]["ray_dashboard"], wanted="Token authentication is enabled.")


def test_the_dashboard_shows_the_cluster_to_who_has_the_token(
    stack: OwnStack, story: dict[str, Any], browser: Browser
) -> None:
    dashboard = story["links"]["ray_dashboard"].split("/#")[0]
    token = Path(stack.home / "ray_token").read_text().strip()
    shown = browser.text(f"{dashboard}/#/cluster", wanted="ALIVE", cookies={"ray-authentication-token": token})
    assert "127.0.0.1" in shown
