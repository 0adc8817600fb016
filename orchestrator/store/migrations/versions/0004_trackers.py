"""A tracker vouches for all its attempts with one row; stop requests are found without asking for each run."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
CREATE TABLE trackers (
  id text NOT NULL,
  beats bigint NOT NULL,
  alive_at timestamptz NOT NULL DEFAULT now(),
  CONSTRAINT trackers_pkey PRIMARY KEY (id)
)
""",
    "ALTER TABLE attempts DROP COLUMN alive_at",
    "ALTER TABLE attempts ADD COLUMN tracker text",
    "CREATE INDEX runs_to_stop ON runs (id) WHERE cancel_requested_at IS NOT NULL AND ended_at IS NULL",
)


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
