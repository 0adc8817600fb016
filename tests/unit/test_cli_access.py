"""Which API server a reading verb asks, and with which token."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.catalog import address
from orchestrator.cli import access, parser
from orchestrator.cli.main import main
from orchestrator.errors import UserError
from orchestrator.stack import Stack

OTHER = "http://other:8600"
OWN = "http://127.0.0.1:8601"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stack with an API server, which is the default one."""
    Stack(home=str(tmp_path), api_url=OWN, api_token_path=f"{tmp_path}/api_token", ray_dashboard="http://d").save()
    monkeypatch.setenv("ORC_HOME", str(tmp_path))
    for name in (address.API_VARIABLE, *address.TOKEN_VARIABLES, "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_the_option_wins_over_the_environment_and_both_over_the_stack(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert access.told_url(parser.parse(["ls"])[1]) == ""
    monkeypatch.setenv("ORC_API_URL", OTHER)
    assert access.told_url(parser.parse(["ls"])[1]) == OTHER
    assert access.told_url(parser.parse(["ls", "--api", "h:1"])[1]) == "h:1"


def test_a_home_on_the_command_line_means_that_stack(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORC_API_URL", OTHER)
    assert access.told_url(parser.parse(["--home", str(home), "ls"])[1]) == ""
    assert access.told_url(parser.parse(["ls", "--home", str(home)])[1]) == ""


def test_the_stacks_own_address_in_the_environment_means_the_stack(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So `orc ls` in a shell with `orc env` still looks when only the API server is down."""
    monkeypatch.setenv("ORC_API_URL", OWN)
    assert access.told_url(parser.parse(["ls"])[1]) == ""


def test_the_dashboard_of_another_host_is_not_the_stacks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert access.ray_dashboard(parser.parse(["show"])[1]) == "http://d"
    assert access.ray_dashboard(parser.parse(["show", "--api", OTHER])[1]) == ""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://tunnel")
    assert access.ray_dashboard(parser.parse(["show", "--api", OTHER])[1]) == "http://tunnel"


def test_the_first_variable_that_is_set_gives_the_token(tmp_path: Path) -> None:
    for name in ("orc", "ray"):
        (tmp_path / name).write_text(f"{name}-file\n")
    everything = {
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "ray"),
        "RAY_AUTH_TOKEN": "ray",
        "ORC_API_TOKEN_PATH": str(tmp_path / "orc"),
        "ORC_API_TOKEN": " orc ",
    }
    wanted = ["orc", "orc-file", "ray", "ray-file"]
    for name, token in zip(address.TOKEN_VARIABLES, wanted, strict=True):
        assert address.token_from(everything, OTHER)[0] == token
        assert address.token_from(everything, OTHER)[1].startswith(name)
        del everything[name]
    with pytest.raises(UserError, match="ORC_API_TOKEN_PATH"):
        address.token_from(everything, OTHER)


def test_env_tells_others_where_to_ask(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"export ORC_API_URL={OWN}" in lines
    assert f"export ORC_API_TOKEN_PATH={home}/api_token" in lines
