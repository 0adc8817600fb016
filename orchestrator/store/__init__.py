"""The one store: tables, migrations, and the only door to them. Opened on demand: services stay light."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.store.store import Store


def open_store(url: str) -> Store:
    """The database at `url` (SQLAlchemy form). Connects lazily."""
    from orchestrator.store.store import Store

    return Store(url)
