"""Secrets appear nowhere in clear."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from orchestrator.config import SecretFilter, compose, looks_secret, redact, redact_text, redact_url, render
from orchestrator.errors import ConfigError

CANARY = "c4nary/wi+h \"quotes'&%"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "password",
            "db_password",
            "PGPASSWORD",
            "HF_TOKEN",
            "token",
            "authToken",
            "api_key",
            "WANDB_API_KEY",
            "apiKey",
        ),
        *("AWS_SECRET_ACCESS_KEY", "client_secret", "credentials", "private-key", "run.login.passphrase", "auth"),
    ],
)
def test_secret_names_are_known(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "max_tokens",
            "pad_token",
            "eos_token",
            "tokenizer",
            "token_dim",
            "tokens",
            "key",
            "keys",
            "n_pass",
            "author",
        ),
        *("num_heads", "hidden", "monkey", "passes", "database_url", "keep_last", "authors"),
    ],
)
def test_ordinary_names_are_left_alone(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql+psycopg://u:p%40w@h:5432/db?host=/x", "postgresql+psycopg://u:***@h:5432/db?host=/x"),
        ("redis://:pw@h", "redis://:***@h"),
        ("https://h/x?a=1&token=abc&b=2", "https://h/x?a=1&token=***&b=2"),
        ("host=h user=u password=pw dbname=d", "host=h user=u password=*** dbname=d"),
        ("postgresql://u:${oc.env:PW}@h/d", "postgresql://u:${oc.env:PW}@h/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("postgresql://u:p@ss:w@h/d", "postgresql://u:***@h/d"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("see http://h:80/a and ssh://u:pw@h2/b", "see http://h:80/a and ssh://u:***@h2/b"),
    ],
)
def test_passwords_leave_urls(url: str, shown: str) -> None:
    assert redact_url(url) == shown


def test_nested_values_are_redacted_by_key() -> None:
    values = {
        "a": {"password": "x1", "api_key": 55, "pad_token": "<p>", "use_token": True, "token": 3},
        "credentials": {"user": "u", "ids": [1, "b"]},
        "urls": ["redis://:pw@h", {"secret": "y"}],
        "empty_secret": "",
        "lr": 0.1,
    }
    assert redact(values) == {
        "a": {"password": "***", "api_key": "***", "pad_token": "<p>", "use_token": True, "token": 3},
        "credentials": {"user": "***", "ids": ["***", "***"]},
        "urls": ["redis://:***@h", {"secret": "***"}],
        "empty_secret": "",
        "lr": 0.1,
    }


def test_secrets_leave_texts_in_every_spelling() -> None:
    from urllib.parse import quote

    text = f"{CANARY} {quote(CANARY, safe='')} {json.dumps(CANARY)} {CANARY!r}"
    assert redact_text(text, [CANARY]).count("***") == 4
    assert "c4nary" not in redact_text(text, [CANARY])
    assert redact_text("a cat sat", ["a", ""]) == "a cat sat"


def test_longer_secrets_go_first() -> None:
    assert redact_text("abcdefgh", ["abcd", "abcdefgh"]) == "***"


def test_log_records_lose_their_secrets() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(message)s %(place)s", defaults={"place": ""}))
    handler.addFilter(SecretFilter([CANARY]))
    logger = logging.Logger("canary")
    logger.addHandler(handler)
    logger.info("connecting with %s", CANARY, extra={"place": f"postgresql://u:{'pw'}@h"})
    logger.info("%(password)s", {"password": CANARY})
    try:
        raise RuntimeError(CANARY)
    except RuntimeError:
        logger.exception("failed")
    said = stream.getvalue()
    assert "c4nary" not in said
    assert ":pw@" not in said
    assert "RuntimeError: ***" in said
    assert "connecting with ***" in said


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "secret_code.py").write_text("def train(run, cfg): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "secret_code", raising=False)
    return tmp_path


def test_configuration_with_secrets_is_stored_without(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-one")
    monkeypatch.setenv("ORC_DATABASE_URL", "postgresql://u:canary-two@h/d")
    job = compose(
        [
            "train=secret_code:train",
            "database=external",
            "hub='${oc.env:HF_TOKEN}'",
            "+data.url='https://x:${oc.env:HF_TOKEN}@h/p'",
            "data.password=canary-three",
            "data.copy='${data.password}'",
            "data.again='${hub}'",
            "+run.tags.link='https://a:canary-four@h'",
        ]
    )
    assert job.user["hub"] == "canary-one"
    assert job.user["data"]["url"] == "https://x:canary-one@h/p"
    assert job.settings.database.url == "postgresql://u:canary-two@h/d"
    shown = [json.dumps(job.resolved), render(job), repr(job), str(job.sources), str(job.params), repr(job.settings)]
    for text in shown[:5]:
        for number in ("one", "two", "four"):
            assert f"canary-{number}" not in text
    assert "canary-two" not in shown[5]
    assert job.resolved["hub"] == "${oc.env:HF_TOKEN}"
    assert job.resolved["data"]["password"] == "***"
    assert job.resolved["data"]["copy"] == "***"
    assert job.resolved["database"]["url"] == "postgresql://u:***@h/d"
    assert {"canary-one", "canary-two", "canary-three", "canary-four"} <= set(job.secrets)


def test_new_value_of_a_secret_is_the_same_work(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-one")
    first = compose(["train=secret_code:train", "hub='${oc.env:HF_TOKEN}'"])
    monkeypatch.setenv("HF_TOKEN", "canary-new")
    again = compose([], base=first.resolved)
    assert again.user["hub"] == "canary-new"
    assert again.hash == first.hash


def test_lost_secret_is_asked_for(project: Path) -> None:
    first = compose(["train=secret_code:train", "login.password=canary", "lr=1"])
    with pytest.raises(ConfigError, match="login.password: is a secret, and a stored configuration holds no secrets"):
        compose([], base=first.resolved)
    assert compose(["+login.password=canary2"], base=first.resolved).user["login"] == {"password": "canary2"}


def test_errors_show_no_secrets(project: Path) -> None:
    for override in (
        "database.urll=postgresql://u:canary@h/d",
        "login.password={canary",
        "storage.url=s4://u:canary@h",
    ):
        with pytest.raises(ConfigError) as caught:
            compose(["train=secret_code:train", override])
        assert "canary" not in str(caught.value)
