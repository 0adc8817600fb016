from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import application
from orchestrator.errors import ConfigError, ServiceUnavailable
from orchestrator.stack import Stack, StackSettings, default_home


def test_settings_are_read_from_words() -> None:
    settings = StackSettings.parse(["ray.num_cpus=4", "mlflow.enabled=False", "ray.port=auto", "storage.url=s3://b/x"])
    assert (settings.ray.num_cpus, settings.mlflow.enabled, settings.ray.port) == (4, "false", 0)
    assert settings.storage.url == "s3://b/x"


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_a_database_url_becomes_ours(scheme: str) -> None:
    url = StackSettings.parse([f"database.url={scheme}://u:p@h/db?sslmode=require"]).database.url
    assert url == "postgresql+psycopg://u:p@h/db?sslmode=require"


def test_what_checkpoints_go_through_can_be_said() -> None:
    said = StackSettings.parse(
        ["checkpoints.writers=0", "checkpoints.memory_gb=2.5", "checkpoints.slab_dir=/dev/shm/x"]
    )
    assert vars(said.checkpoints) == {"slab_dir": "/dev/shm/x", "writers": 0, "memory_gb": 2.5}
    assert vars(StackSettings.parse([]).checkpoints) == {"slab_dir": "", "writers": 1, "memory_gb": 0.0}


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean mlflow\.tracking_uri\?"):
        StackSettings.parse(["mlflow.tracking_url=http://h"])


@pytest.mark.parametrize(
    "word",
    [
        "database.url=mysql://u@h/d", "database=x", "ray.num_cpus=two", "ray.enabled=perhaps", "ray.address=head",
        "checkpoints.writers=17", "checkpoints.writers=auto", "checkpoints.memory_gb=-1", "checkpoints.memory_gb=nan",
        "checkpoints.slab_dir=here", "mlflow.port=70000", "mlflow.tracking_uri=ftp://h", "nonsense", "ray.port=-1",
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_key(word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        StackSettings.parse([word])
    assert str(refused.value).startswith(word.split("=")[0])


def test_a_refused_url_does_not_show_its_password() -> None:
    with pytest.raises(ConfigError) as refused:
        StackSettings.parse(["database.url=mysql://u:secret@h/d"])
    assert "secret" not in str(refused.value)


def test_a_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PW", "s3cret")
    settings = StackSettings.parse(["database.url=postgresql://u:${oc.env:PW}@h:${oc.env:NO_SUCH,5432}/d"])
    assert settings.database.url == "postgresql+psycopg://u:s3cret@h:5432/d"
    with pytest.raises(ConfigError, match="NO_SUCH is not set"):
        StackSettings.parse(["database.url=postgresql://${oc.env:NO_SUCH}@h/d"])


def test_a_stack_is_saved_for_its_owner_only_and_read_back(tmp_path: Path) -> None:
    stack = Stack(
        home=str(tmp_path), database_url="postgresql+psycopg://u:secret@h/d", processes={"mlflow": {"pid": 3}}
    )
    stack.save()
    assert stat.S_IMODE((tmp_path / "stack.json").stat().st_mode) == 0o600
    assert Stack.load(tmp_path) == stack
    assert "secret" not in repr(stack)
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


def test_a_moved_stack_knows_its_new_home(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(json.dumps({"protocol": 1, "home": "/elsewhere", "later_field": 1}))
    assert Stack.load(tmp_path).home == str(tmp_path)


@pytest.mark.parametrize(("text", "why"), [("{", "is damaged"), ('{"protocol": 2}', "protocol 2")])
def test_a_file_that_cannot_be_used_is_told(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "stack.json").write_text(text)
    with pytest.raises(ServiceUnavailable, match=why):
        Stack.load(tmp_path)


def test_nothing_started_says_what_to_do(tmp_path: Path) -> None:
    assert Stack.find(tmp_path) is None
    with pytest.raises(ServiceUnavailable, match="Run `orc up`"):
        Stack.load(tmp_path)


def test_the_home_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORC_HOME", "~/here")
    assert default_home() == Path.home() / "here"
    monkeypatch.delenv("ORC_HOME")
    assert default_home() == Path.home() / ".orc"


def test_clients_of_our_head_authenticate_and_stay_on_loopback() -> None:
    ours = Stack(
        home="/h", ray_address="127.0.0.1:1", ray_dashboard="http://127.0.0.1:2", ray_token_path="/h/ray_token"
    )
    environment = ours.client_environment()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/h/ray_token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert environment["RAY_ADDRESS"] == "127.0.0.1:1"
    assert environment["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600", "its control store is started again"


def test_clients_of_another_cluster_keep_their_own_authentication() -> None:
    environment = Stack(home="/h", ray_address="10.0.0.1:6379").client_environment()
    assert not any(name.startswith("RAY_AUTH") for name in environment)
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in environment


def test_a_proxy_is_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    assert "no_proxy" not in Stack(home="/h").client_environment()
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intranet")
    assert Stack(home="/h").client_environment()["no_proxy"] == "intranet,127.0.0.1,localhost"


def test_reading_a_stack_is_light() -> None:
    heavy = "{'ray', 'torch', 'sqlalchemy', 'mlflow', 'psutil'}"
    code = f"import sys, orchestrator.stack; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_application_folders_are_found() -> None:
    root = application.root()
    assert (root / "cluster" / "__main__.py").is_file()
    assert (root / "actors").is_dir()
