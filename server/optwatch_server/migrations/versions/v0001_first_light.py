"""Runs, tags, ranks and events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "runs",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("project", sa.Text, nullable=False),
        sa.Column("team", sa.Text, nullable=False),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("optimizer", sa.Text, nullable=False),
        sa.Column("hyperparameters", sa.JSON, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("world_size", sa.BigInteger),
        sa.Column("seed", sa.String(24)),
        sa.Column("resumed_from", sa.String(128)),
        sa.Column("target", sa.JSON),
        sa.Column("versions", sa.JSON, nullable=False),
        sa.Column("code_version", sa.Text, nullable=False),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("pid", sa.BigInteger),
        sa.Column("heartbeat_interval_seconds", sa.Double, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("status_since", sa.Double, nullable=False),
        sa.Column("lost_at", sa.Double),
        sa.Column("lost_reason", sa.Text, nullable=False),
        sa.Column("finished_at", sa.Double),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("final_step", sa.BigInteger),
    )
    op.create_index("runs_newest", "runs", ["created_at", "id"])
    op.create_index("runs_by_status", "runs", ["status", "created_at", "id"])
    op.create_index("runs_by_project", "runs", ["project", "created_at", "id"])
    op.create_index("runs_by_team", "runs", ["team", "created_at", "id"])
    op.create_table(
        "run_tags",
        sa.Column("run_id", sa.String(128), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.create_index("run_tags_by_name", "run_tags", ["name", "value", "run_id"])
    op.create_table(
        "ranks",
        sa.Column("run_id", sa.String(128), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("rank", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("step", sa.BigInteger),
        sa.Column("sent_at", sa.Double),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("interval_seconds", sa.Double, nullable=False),
        sa.Column("promise_seconds", sa.Double),
        sa.Column("promise_reason", sa.Text, nullable=False),
        sa.Column("due_at", sa.Double, nullable=False),
        sa.Column("metrics_target", sa.String(300)),
        sa.Column("latest", sa.JSON, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("run_id", sa.String(128), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("rank", sa.BigInteger, nullable=False),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("severity", sa.String(16), nullable=False),
        sa.Column("step", sa.BigInteger),
        sa.Column("occurred_at", sa.Double, nullable=False),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("likely", sa.Text, nullable=False),
        sa.Column("runbook", sa.String(128), nullable=False),
        sa.Column("details", sa.JSON, nullable=False),
    )
    op.create_index("events_in_order", "events", ["run_id", "occurred_at", "rank", "sequence", "id"])


def downgrade() -> None:
    """Go back to the one before."""
    for table in ("events", "ranks", "run_tags", "runs"):
        op.drop_table(table)
