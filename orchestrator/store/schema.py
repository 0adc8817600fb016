"""Which schema a database has, compared with the one this code needs."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection

from orchestrator.store.tables import HEAD, REVISIONS, VERSION_TABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaStatus:
    """Example: SchemaStatus(found="", head="0001", is_current=False, is_newer=False): an empty database."""

    found: str
    """Revision of the database; empty when it has none of our tables."""
    head: str
    """Revision that this code needs."""
    is_current: bool
    is_newer: bool
    """The database was written by a newer version of this code."""


def schema_status(connection: Connection) -> SchemaStatus:
    exists = connection.exec_driver_sql(f"SELECT to_regclass('{VERSION_TABLE}') IS NOT NULL").scalar_one()
    found = connection.exec_driver_sql(f"SELECT max(version_num) FROM {VERSION_TABLE}").scalar() if exists else None
    return SchemaStatus(
        found=found or "", head=HEAD, is_current=found == HEAD, is_newer=bool(found) and found not in REVISIONS
    )
