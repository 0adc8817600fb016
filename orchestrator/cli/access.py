"""Whom a reading verb asks; the rule is in orchestrator/catalog/address.py."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager

from orchestrator.catalog import Catalog, open_catalog
from orchestrator.catalog.address import known_stack
from orchestrator.catalog.address import told_url as url_of


def asked_catalog(arguments: argparse.Namespace) -> AbstractContextManager[Catalog]:
    """The catalog that the command line and the environment mean. Raises ServiceUnavailable, SchemaMismatch."""
    return open_catalog(arguments.home if arguments.home_is_given else None, api=arguments.api)


def told_url(arguments: argparse.Namespace) -> str:
    """The address of an API server, empty where the stack is asked."""
    return url_of(arguments.api, arguments.home if arguments.home_is_given else None)


def ray_dashboard(arguments: argparse.Namespace) -> str:
    """Where Ray's dashboard is for whoever asks here; empty if that is not known."""
    stack = None if told_url(arguments) else known_stack(arguments.home)
    return stack.ray_dashboard if stack else os.environ.get("RAY_API_SERVER_ADDRESS", "")
