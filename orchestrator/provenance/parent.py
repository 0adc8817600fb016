"""What was recorded once for many runs: source and packages of a sweep's trials are those of the sweep. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

OF = "of"
"""In a provenance: the run that has the rest of it."""
_OWN = ("ranks", "pid", "seed", "resources")
"""What is true of the attempt itself only."""


def parent_of(provenance: Mapping[str, Any]) -> str:
    """The run where the rest of it is recorded; '' where all of it is here."""
    found = provenance.get(OF, "")
    return found if isinstance(found, str) else ""


def inherited(
    own: Mapping[str, Any], parents: Iterable[tuple[float, Mapping[str, Any]]], *, started: float, config_hash: str
) -> dict[str, Any]:
    """`own` with what the parent's attempt has besides that went on when it began. `parents` are (began, provenance)
    of all attempts of the parent. The fingerprint has the parent's code and environment, and its own configuration."""
    from orchestrator.config.identity import whole_fingerprint  # loads the settings and numpy: only for a sweep's trial

    known = sorted(((began, found) for began, found in parents if found), key=lambda each: each[0])
    there = [found for began, found in known if began <= started] or [found for _, found in known[:1]]
    if not there:
        return dict(own)
    parent = there[-1]
    hashes = {**_mapping(parent, "fingerprint"), "config": config_hash, **_mapping(own, "fingerprint")}
    return {
        **{name: value for name, value in parent.items() if name not in _OWN},
        **own,
        "fingerprint": {**hashes, "run": whole_fingerprint(hashes)},
    }


def _mapping(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}
