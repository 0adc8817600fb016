"""Which of a run's metrics tells how it went, when only one or a few can be shown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FIRST_WORDS = (("val", "valid", "validation", "test", "eval"), ("train",))
"""What keys begin with, before the first `/`: those of the first group tell more than those of the second."""

AUTOMATIC = ("perf", "system")
"""First words of what is recorded without being asked: how fast a run went and what its machines did, not how well."""


def is_automatic(key: str) -> bool:
    return key.split("/")[0] in AUTOMATIC


def by_weight(keys: Iterable[str]) -> list[str]:
    """What is validated or tested before what is trained, then the rest by name; what is automatic comes last."""
    return sorted(keys, key=lambda key: (is_automatic(key), *_weight(key)))


def _weight(key: str) -> tuple[int, str]:
    word = key.split("/")[0]
    return next((place for place, group in enumerate(FIRST_WORDS) if word in group), len(FIRST_WORDS)), key


def main_key(directions: Mapping[str, str]) -> str | None:
    """One with a declared direction if there is any, validation before training; never an automatic one.

    `directions` gives min, max or empty for each key.
    Example: main_key({"train/loss": "", "val/loss": "min"}) == "val/loss".
    """
    keys = [key for key in directions if not is_automatic(key)]
    declared = [key for key in keys if directions[key]]
    return next(iter(by_weight(declared or keys)), None)
