"""Whose account this process runs under."""

from __future__ import annotations

import getpass
import os


def user_name() -> str:
    """The name; the number where an account has no name, as often in containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
