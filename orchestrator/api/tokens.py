"""Who may read."""

from __future__ import annotations

import hmac
from pathlib import Path

from orchestrator.errors import ServiceUnavailable
from orchestrator.stack import Stack

FILE = "api_token"
"""In the data directory, mode 0600."""


class Tokens:
    """The tokens of one data directory: the API's own and, where the Ray head is ours, Ray's.

    Whoever has Ray's may run code here, so reading is no more. Files are read for each question: a token that was
    replaced is refused from then on.
    """

    def __init__(self, home: Path) -> None:
        self._home = home

    def accept(self, given: str) -> bool:
        """In a time that does not tell how much of a wrong token was right."""
        sent = given.encode(errors="replace")
        matches = [hmac.compare_digest(sent, known.encode()) for known in self._known()]
        return any(matches)

    def _known(self) -> list[str]:
        try:
            stack = Stack.find(self._home)
        except ServiceUnavailable:  # damaged; the API's own token does not need it
            stack = None
        paths = [self._home / FILE, *([Path(stack.ray_token_path)] if stack and stack.owns_ray else [])]
        return [token for token in map(_content, paths) if token]


def _content(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
