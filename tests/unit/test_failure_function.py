"""What the user's function says of a failure, and what becomes of one that raises, hangs or says nonsense."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from orchestrator.config.functions import load_failure_function
from orchestrator.errors import ConfigError
from orchestrator.failures.function import NoAnswer, wanted
from orchestrator.failures.policy import Action

FAILURE, DECISION = {"kind": "hang"}, {"action": "restart"}


def as_told(failure: dict[str, Any], decision: dict[str, Any]) -> Any:
    return failure["answer"]


def of_one(failure: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("said", "action"), [(None, None), ("stop", Action.stop), (Action.restart, Action.restart), ("halve", Action.halve)]
)
def test_it_answers_with_an_action_or_nothing(said: Any, action: Action | None) -> None:
    assert wanted(as_told, {"answer": said}, DECISION) is action


def test_what_it_does_to_its_arguments_changes_nothing() -> None:
    def spoils(failure: dict[str, Any], decision: dict[str, Any]) -> None:
        failure.clear()
        decision["action"] = "stop"

    assert wanted(spoils, FAILURE, DECISION) is None
    assert (FAILURE, DECISION) == ({"kind": "hang"}, {"action": "restart"})


def test_nonsense_exceptions_and_silence_are_no_answers() -> None:
    with pytest.raises(NoAnswer, match="answered 'go on', which is no action: stop, restart"):
        wanted(as_told, {"answer": "go on"}, DECISION)
    with pytest.raises(NoAnswer, match="it raised KeyError: 'answer'"):
        wanted(as_told, {}, DECISION)
    over = threading.Event()
    with pytest.raises(NoAnswer, match="not answered within 0.01 seconds"):
        wanted(lambda *_: over.wait(60), FAILURE, DECISION, limit=0.01)
    over.set()


def test_a_function_that_cannot_be_called_is_refused_before_anything_starts() -> None:
    here = "tests.unit.test_failure_function"
    assert load_failure_function(f"{here}:as_told").__name__ == "as_told"
    for reference, why in {
        "as_told": "does not name a function",
        "nowhere_to_be_found:it": "no module nowhere_to_be_found",
        f"{here}:as_tld": "has no function as_tld",
        f"{here}:of_one": r"called as of_one\(failure, decision\)",
    }.items():
        with pytest.raises(ConfigError, match=why) as refused:
            load_failure_function(reference)
        assert refused.value.key == "failures.function"
