"""Whom a reader asks: an API server that it was told of, else the stack of a data directory. And with which token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.stack import Stack, default_home

API_VARIABLE = "ORC_API_URL"
TOKEN_VARIABLES = ("ORC_API_TOKEN", "ORC_API_TOKEN_PATH", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""In the order in which they count; a name that ends in PATH names a file."""


def told_url(api: str, home: Path | None) -> str:
    """The address of an API server, empty to use the stack: `api`, else ORC_API_URL unless `home` names a stack.

    The stack's own address in the environment is no other server: whoever has the output of `orc env` there can still
    look when only the API server is down.
    """
    url = api or ("" if home else os.environ.get(API_VARIABLE, ""))
    own = known_stack(home or default_home())
    return "" if own and url == own.api_url and not api else url


def known_stack(home: Path) -> Stack | None:
    """The stack in `home`, None if there is none that can be read."""
    try:
        return Stack.find(home)
    except ServiceUnavailable:
        return None


def token_from(environment: Mapping[str, str], url: str) -> tuple[str, str]:
    """The token for an API server, and which variable it was found in."""
    for name in TOKEN_VARIABLES:
        value = environment.get(name, "")
        if value and not name.endswith("_PATH"):
            return value.strip(), name
        if value:
            try:
                return Path(value).expanduser().read_text().strip(), f"{name} ({value})"
            except (OSError, ValueError) as error:
                raise UserError(f"{name} names no file with a token: {value}: {error}.") from error
    raise UserError(
        f"There is no token for the API server at {url}. Copy the file api_token from the data directory of its host "
        f"and set {TOKEN_VARIABLES[1]} to your copy, or {TOKEN_VARIABLES[0]} to its text."
    )
