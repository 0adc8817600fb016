"""Checkpoints tell how and why they were saved, and whether training can go on from them."""

from __future__ import annotations

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
ALTER TABLE checkpoints
  ADD COLUMN resumable boolean NOT NULL DEFAULT true,
  ADD COLUMN kind text NOT NULL DEFAULT '',
  ADD COLUMN world_size integer,
  ADD COLUMN reasons jsonb,
  ADD COLUMN timings jsonb
""",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
