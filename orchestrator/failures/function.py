"""The user's word on what follows a failed attempt: `failures.function`, asked in the driver before a decision is
carried out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.failures.policy import Action

LIMIT = 5.0
"""Seconds in which it has to answer."""
LOG_LINES = 50
"""Last lines of the log that it gets."""

Function = Callable[[dict[str, Any], dict[str, Any]], Any]
"""Of a failure and a decision, see `failures/README.md`; gives an Action, its name or None."""


class NoAnswer(Exception):
    """The function has not said anything that can be followed."""

    def __init__(self, why: str) -> None:
        super().__init__(why)


def wanted(
    function: Function, failure: Mapping[str, Any], decision: Mapping[str, Any], *, limit: float = LIMIT
) -> Action | None:
    """The action that it wants instead; None: it leaves the decision as it is. Raises NoAnswer when it raises, says
    what is no action, or has not answered after `limit` seconds; its thread is then left alone."""
    said: list[Any] = []
    problems: list[BaseException] = []

    def ask() -> None:
        try:
            said.append(function(dict(failure), dict(decision)))
        except BaseException as error:  # SystemExit as well: it must not end in a thread without a word
            problems.append(error)

    thread = threading.Thread(target=ask, name="failures.function", daemon=True)
    thread.start()
    thread.join(limit)
    if problems:
        raise NoAnswer(f"it raised {type(problems[0]).__name__}: {problems[0]}") from problems[0]
    if not said:
        raise NoAnswer(f"it has not answered within {limit:g} seconds")
    return _action(said[0])


def _action(said: Any) -> Action | None:
    if said is None:
        return None
    try:
        return Action(said)
    except ValueError:
        known = ", ".join(Action)
        raise NoAnswer(f"it answered {said!r}, which is no action: {known}") from None
