"""Run by Alembic. Works on the connection that migrate.py passes, in its transaction; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from orchestrator.store.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
