"""Where an attempt comes from, also where that is recorded with another run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orchestrator.errors import NotFound
from orchestrator.provenance.parent import inherited, parent_of

if TYPE_CHECKING:
    from orchestrator.catalog import Catalog
    from orchestrator.store.views import AttemptRow, RunDetail


def whole_provenance(catalog: Catalog, row: AttemptRow) -> tuple[Mapping[str, Any], RunDetail | None]:
    """With what is recorded once for several runs, and the run that has it: a sweep for its trials. None: it has all of
    it itself, or that run was removed."""
    of = parent_of(row.provenance)
    if not of:
        return row.provenance, None
    try:
        parent = catalog.run(of)
    except NotFound:
        return row.provenance, None
    attempts = [(each.started, each.provenance) for each in catalog.attempts(parent.run)]
    return inherited(row.provenance, attempts, started=row.started, config_hash=row.config_hash), parent
