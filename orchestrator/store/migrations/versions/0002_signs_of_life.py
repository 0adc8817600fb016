"""When a tracker last vouched for an attempt, so that several trackers on one database do not end each other's runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("attempts", sa.Column("alive_at", sa.DateTime(timezone=True), nullable=True))
