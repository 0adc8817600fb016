"""Whom a reading verb asks: an API server that it was told of, else the stack of the data directory."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from orchestrator.catalog import Catalog, open_catalog
from orchestrator.errors import ServiceUnavailable, UserError
from orchestrator.stack import Stack

API_VARIABLE = "ORC_API_URL"
TOKEN_VARIABLES = ("ORC_API_TOKEN", "ORC_API_TOKEN_PATH", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""In the order in which they count; a name that ends in PATH names a file."""


@contextmanager
def asked_catalog(arguments: argparse.Namespace) -> Iterator[Catalog]:
    """The catalog that the command line and the environment mean. Raises ServiceUnavailable, SchemaMismatch.

    `--api`, else ORC_API_URL unless `--home` names a stack, else the stack: its API server if it lives, else its
    database.
    """
    url = told_url(arguments)
    if not url:
        with open_catalog(arguments.home) as catalog:
            yield catalog
        return
    from orchestrator.catalog.remote import HttpCatalog

    token, found_in = token_from(os.environ, url)
    with closing(HttpCatalog(url, token, token_from=found_in)) as server:
        server.check()
        yield server


def told_url(arguments: argparse.Namespace) -> str:
    """The address of an API server, empty to use the stack. The stack's own address is no other server: whoever has
    the output of `orc env` in the environment can still look when only the API server is down."""
    url = arguments.api or ("" if arguments.home_is_given else os.environ.get(API_VARIABLE, ""))
    own = known_stack(arguments.home)
    return "" if own and url == own.api_url and not arguments.api else url


def ray_dashboard(arguments: argparse.Namespace) -> str:
    """Where Ray's dashboard is for whoever asks here; empty if that is not known."""
    stack = None if told_url(arguments) else known_stack(arguments.home)
    return stack.ray_dashboard if stack else os.environ.get("RAY_API_SERVER_ADDRESS", "")


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
