"""Recordings: the black boxes of incidents, whose numbers are in the store and whose place is here."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "recordings",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("run_id", sa.String(128), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("rank", sa.BigInteger, nullable=False),
        sa.Column("reason", sa.String(64), nullable=False),
        sa.Column("step", sa.BigInteger),
        sa.Column("layer", sa.Text, nullable=False),
        sa.Column("first_step", sa.BigInteger),
        sa.Column("last_step", sa.BigInteger),
        sa.Column("recorded_at", sa.Double, nullable=False),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("path", sa.Text, nullable=False),
    )
    op.create_index("recordings_of_run", "recordings", ["run_id", "received_at", "id"])


def downgrade() -> None:
    """Go back to the one before. The files in the store stay where they are."""
    op.drop_table("recordings")
