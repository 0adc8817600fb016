"""From a configuration to who is told what, and what of it may be stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.alerts.addresses import Addresses
from orchestrator.alerts.outbox import LONGEST_PAUSE, pause
from orchestrator.alerts.plan import Channel, channels_to_test, planned
from orchestrator.alerts.rules import parse_rules
from orchestrator.alerts.service import RuleSet
from orchestrator.config import Settings, build, compose
from orchestrator.errors import ConfigError

URL = "https://hooks.example.org/T0/B0/abcdef"


def plan(alerts: dict[str, Any] | None = None, notify: list[Any] | None = None, **environ: str) -> dict[str, Any]:
    settings = build(Settings, {"alerts": alerts or {}, "notify": notify or []})
    return planned(settings.alerts, settings.notify, environ)


def test_the_defaults_need_no_plan() -> None:
    assert plan() == {}


def test_a_notifier_is_a_name_an_address_or_options() -> None:
    found = plan(
        {"slack": {"webhook": URL}, "email": {"host": "mail"}},
        ["slack", {"webhook": URL}, {"slack": {"channel": "#b", "on": "failure"}}, {"email": {"to": ["a@x.org"]}}],
    )
    assert [each["channel"] for each in found["job"]] == ["slack", "webhook", "slack-2", "email"]
    assert [each["on"] for each in found["job"]][1:3] == [["completion", "failure"], ["failure"]]
    assert found["channels"]["slack-2"]["options"] == {"webhook": URL, "channel": "#b"}
    assert found["channels"]["webhook"]["options"]["url"] == URL
    assert found["all"] == ["log"]


def test_administrators_are_told_of_services_that_are_away() -> None:
    found = plan({"administrators": ["log", {"webhook": URL}]})
    assert found["rules"] == {"degraded": {"event": "degraded", "until": "recovered", "notify": ["log", "webhook"]}}
    assert found["channels"]["webhook"]["options"]["url"] == URL
    assert "degraded" in {rule.name for rule in parse_rules({})}
    assert "degraded" not in {rule.name for rule in parse_rules(plan({"rules": {"degraded": False}})["rules"])}
    with pytest.raises(ConfigError, match=r"alerts\.administrators\[0\]"):
        plan({"administrators": ["nobody"]})
    job = compose([f"alerts.administrators=[{{webhook: '{URL}'}}]"], needs_train=False)
    assert URL not in json.dumps(job.resolved)
    assert URL in job.secrets


def test_recipients_may_be_one_text() -> None:
    found = plan({"email": {"host": "mail"}}, [{"email": "a@x.org, b@x.org"}])
    assert found["channels"]["email"]["options"]["to"] == ["a@x.org", "b@x.org"]


def test_the_environment_fills_what_is_empty() -> None:
    found = plan(notify=["slack"], ORC_SLACK_WEBHOOK=URL)
    assert found["channels"]["slack"]["options"]["webhook"] == URL


@pytest.mark.parametrize(
    ("alerts", "notify", "names"),
    [
        ({}, ["slack"], "ORC_SLACK_WEBHOOK"),
        ({}, ["slak"], "Did you mean slack"),
        ({}, [{"slack": URL, "webhook": URL}], "names no notifier"),
        ({}, [{"webhook": "ftp://x"}], "no URL"),
        ({}, [{"webhook": {"url": URL, "on": "sometimes"}}], "must be completion, failure"),
        ({}, [{"webhook": {"uri": URL}}], "Did you mean"),
        ({}, [{"log": "x"}], "no such option"),
        ({}, ["email"], "alerts.email.host"),
        ({"rules": {"a": {"metric": "a", "when": "> 5", "notify": "pagerduty"}}}, [], "ORC_PAGERDUTY_ROUTING_KEY"),
        ({"rules": {"a": {"metric": "a"}}}, [], "alerts.rules.a.when"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_exists(alerts: dict[str, Any], notify: list[Any], names: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(alerts, notify)
    assert names in str(caught.value)
    assert URL not in str(caught.value)


def test_a_test_is_sent_to_whoever_is_named_or_to_all() -> None:
    settings = build(Settings, {"alerts": {"slack": {"webhook": URL}}, "notify": [{"webhook": URL}]})
    assert list(channels_to_test(settings.alerts, settings.notify, {}, ["slack"])) == ["slack"]
    assert list(channels_to_test(settings.alerts, settings.notify, {}, [])) == ["webhook", "log"]
    plain = build(Settings, {})
    assert list(channels_to_test(plain.alerts, plain.notify, {}, [])) == ["log"]


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_addresses_are_in_no_stored_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_WEBHOOK", f"{URL}/team")
    job = compose(
        [
            f"notify=[{{slack:'{URL}/one'}},{{webhook:{{url:'{URL}/two',on:failure}}}},{{webhook:'${{oc.env:TEAM_WEBHOOK}}'}}]",
            f"alerts.slack.webhook='{URL}/three'",
            "alerts.pagerduty.routing_key=0123456789abcdef",
            "alerts.email.password=pa55word",
            "alerts.rules.high={metric: train/loss, when: '> 5', message: 'see https://wiki'}",
        ],
        needs_train=False,
    )
    stored = json.dumps([job.resolved, job.sources])
    assert not [part for part in ("abcdef", "pa55word", "hooks.example") if part in stored]
    assert job.resolved["notify"][1] == {"webhook": {"url": "***", "on": "failure"}}
    assert job.resolved["notify"][2] == {"webhook": "${oc.env:TEAM_WEBHOOK}"}
    assert job.resolved["alerts"]["rules"] == {
        "high": {"metric": "train/loss", "when": "> 5", "message": "see https://wiki"}
    }
    assert {f"{URL}/one", f"{URL}/two", f"{URL}/three"} <= set(job.secrets)
    assert (
        planned(job.settings.alerts, job.settings.notify, {})["channels"]["webhook-2"]["options"]["url"]
        == f"{URL}/team"
    )


def test_an_address_that_was_not_stored_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_WEBHOOK", URL)
    stored = compose([f"notify=[{{webhook:'{URL}'}}]"], needs_train=False).resolved
    again = compose([], base=stored, needs_train=False)
    with pytest.raises(ConfigError, match="holds no secrets"):
        planned(again.settings.alerts, again.settings.notify, {})
    by_name = compose(["notify=[{webhook:'${oc.env:TEAM_WEBHOOK}'}]"], needs_train=False).resolved
    again = compose([], base=by_name, needs_train=False)
    assert planned(again.settings.alerts, again.settings.notify, {})["channels"]["webhook"]["options"]["url"] == URL


def test_who_is_told_changes_no_hash() -> None:
    told = compose([f"notify=[{{webhook:'{URL}'}}]", "alerts.defaults=false"], needs_train=False)
    assert told.hash == compose([], needs_train=False).hash


def test_the_file_of_addresses_keeps_them_and_its_name(tmp_path: Path) -> None:
    file = tmp_path / "addresses.json"
    first = Addresses(file)
    slack = Channel(kind="slack", options={"webhook": URL})
    id_ = first.put(slack)
    assert first.put(Channel(kind="slack", options={"webhook": URL})) == id_
    assert first.put(Channel(kind="slack", options={"webhook": f"{URL}2"})) != id_
    again = Addresses(file)
    assert (again.place, again.find(id_)) == (first.place, slack)
    assert again.find("unknown") is None
    assert URL not in repr(slack)
    file.write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        Addresses(file)


# -- pace --------------------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_the_longest_and_heed_what_the_server_asks() -> None:
    pauses = [pause(tries, "k") for tries in range(1, 30)]
    assert all(0.75 <= later / (1.0 * 2**number) <= 1.25 for number, later in enumerate(pauses[:8]))
    assert max(pauses) <= 1.25 * LONGEST_PAUSE
    assert pause(1, "k", 30.0) == 30.0
    assert len({pause(3, f"run-{number}") for number in range(20)}) > 5, "many do not come at once"


def test_only_keys_that_a_rule_names_are_looked_at() -> None:
    rules = RuleSet(parse_rules({"high": {"metric": "train/*", "when": "> 5"}}))
    wanted = rules.wanted(("lr", "train/loss", "system/memory_percent"))
    assert {index: [rule.name for rule in each] for index, each in wanted.items()} == {1: ["high"], 2: ["memory"]}
    assert rules.wanted(("lr", "train/loss", "system/memory_percent")) is wanted
    assert rules.wanted(("lr",)) == {}
