"""What the ranks of real failures left behind is classified as a person who looks at it would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.failures.classify import Evidence, Finding, first_cause
from orchestrator.failures.rules import RULES, FailureKind, Rule

FOLDER = Path(__file__).parents[1] / "data" / "failures"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(file.read_text(), Loader=_LOADER)
    return found


TRACES = {file.stem: read(file) for file in sorted(FOLDER.glob("*.yaml"))}


def finding_of(trace: dict[str, Any], ranks: list[dict[str, Any]] | None = None) -> Finding:
    evidence = [Evidence(**rank) for rank in ranks or trace["ranks"]]
    return first_cause(evidence, world_size=trace["expect"].get("world_size", 0))


@pytest.mark.parametrize("name", TRACES)
def test_the_cause_of_a_real_failure_is_found(name: str) -> None:
    trace = TRACES[name]
    expected, finding = trace["expect"], finding_of(trace)
    assert expected["kind"], "nobody has said yet what this trace is"
    assert finding.kind == expected["kind"]
    assert finding.rank == expected.get("rank", finding.rank)
    assert finding.is_restart_useful is expected.get("restart", finding.is_restart_useful)
    assert expected["hint"] in finding.hint


@pytest.mark.parametrize("name", [name for name, trace in TRACES.items() if len(trace["ranks"]) > 1])
def test_the_order_in_which_ranks_are_heard_does_not_matter(name: str) -> None:
    trace = TRACES[name]
    turned = finding_of(trace, trace["ranks"][::-1])
    assert (turned.kind, turned.rank) == (finding_of(trace).kind, finding_of(trace).rank)


def test_there_are_enough_traces_and_of_every_kind() -> None:
    recorded = [name for name, trace in TRACES.items() if trace["source"].startswith("recorded")]
    assert len(recorded) >= 40
    untraced = {FailureKind.out_of_memory, FailureKind.limit}  # only read; only said by the driver
    assert {trace["expect"]["kind"] for trace in TRACES.values()} == set(FailureKind) - untraced


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.kind}: {rule.match.pattern[:40]}")
def test_every_rule_is_there_because_of_a_trace(rule: Rule) -> None:
    ranks = [rank for trace in TRACES.values() for rank in trace["ranks"]]
    texts = [f"{rank['type']}: {rank['message']}\n{rank.get('log', '')}" for rank in ranks]
    assert any(rule.match.search(text) for text in texts)
