"""Which of a run's metrics tells how it went, when only one or a few can be shown. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

FIRST_WORDS = (("val", "valid", "validation", "test", "eval"), ("train",))
"""What keys begin with, before the first `/`: those of the first group tell more than those of the second."""


def by_weight(keys: Iterable[str]) -> list[str]:
    """What is validated or tested before what is trained, the rest by name."""
    return sorted(keys, key=_weight)


def _weight(key: str) -> tuple[int, str]:
    word = key.split("/")[0]
    return next((place for place, group in enumerate(FIRST_WORDS) if word in group), len(FIRST_WORDS)), key


def main_key(directions: Mapping[str, str]) -> str | None:
    """One with a declared direction if there is any, validation before training.

    `directions` gives min, max or empty for each key.
    Example: main_key({"train/loss": "", "val/loss": "min"}) == "val/loss".
    """
    declared = [key for key, direction in directions.items() if direction]
    return next(iter(by_weight(declared or directions)), None)
