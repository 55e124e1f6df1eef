"""What operations need: causes and running totals of ended runs, pages to send, and the history of alerts.

Every new column of `runs` has a default in the database, so that a server of the version before can go on inserting.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# History enters the totals here, in one statement a total: counted later it would look like a burst of failures.
_WALL = "CASE WHEN finished_at > started_at THEN finished_at - started_at ELSE 0 END"
_ENDED = "FROM runs WHERE status IN ('succeeded', 'failed', 'cancelled', 'lost') GROUP BY project, status"
_HISTORY = (
    f"SELECT 'optwatch_fleet_runs_ended_total', project, status, COUNT(*) {_ENDED}",
    f"SELECT 'optwatch_fleet_run_seconds_total', project, status, SUM({_WALL}) {_ENDED}",
    f"SELECT 'optwatch_fleet_device_seconds_total', project, status, SUM(COALESCE(world_size, 1) * ({_WALL})) {_ENDED}",
    "SELECT 'optwatch_fleet_failures_total', project, CASE status WHEN 'lost' THEN 'lost' ELSE 'unknown' END, COUNT(*) "
    "FROM runs WHERE status IN ('failed', 'lost') GROUP BY project, status",
    "SELECT 'optwatch_fleet_runs_recovered_total', project, '', 0 FROM runs GROUP BY project",
)


def upgrade() -> None:
    """Go to this revision."""
    op.add_column("runs", sa.Column("cause", sa.String(64), nullable=False, server_default=""))
    op.add_column("runs", sa.Column("counted_status", sa.String(16), nullable=False, server_default="running"))
    op.add_column("runs", sa.Column("counted_seconds", sa.Double, nullable=False, server_default="0"))
    op.create_table(
        "totals",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("project", sa.Text, primary_key=True),
        sa.Column("label", sa.String(64), primary_key=True),
        sa.Column("value", sa.Double, nullable=False),
    )
    for history in _HISTORY:
        op.execute(f"INSERT INTO totals (name, project, label, value) {history}")
    op.execute(f"UPDATE runs SET counted_status = status, counted_seconds = {_WALL} WHERE status <> 'running'")  # noqa: S608
    where = sa.text("status <> counted_status")
    op.create_index("runs_uncounted", "runs", ["id"], sqlite_where=where, postgresql_where=where)
    op.create_index("runs_by_change", "runs", ["status_since"])
    op.create_index("events_by_kind", "events", ["run_id", "kind", "received_at"])
    op.create_table(
        "pages",
        sa.Column("run_id", sa.String(128), sa.ForeignKey("runs.id"), primary_key=True),
        sa.Column("alertname", sa.String(128), primary_key=True),
        sa.Column("starts_at", sa.Double, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("due_at", sa.Double),
        sa.Column("attempts", sa.BigInteger, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("accepted_at", sa.Double),
        sa.Column("ends_at", sa.Double),
    )
    op.create_index("pages_due", "pages", ["due_at"])
    op.create_table(
        "alerts",
        sa.Column("fingerprint", sa.String(64), primary_key=True),
        sa.Column("starts_at", sa.Double, primary_key=True),
        sa.Column("run_id", sa.String(128), sa.ForeignKey("runs.id"), nullable=False),
        sa.Column("alertname", sa.String(128), nullable=False),
        sa.Column("severity", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("ends_at", sa.Double),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.Column("summary", sa.Text, nullable=False),
        sa.Column("description", sa.Text, nullable=False),
    )
    op.create_index("alerts_of_run", "alerts", ["run_id", "starts_at", "fingerprint"])


def downgrade() -> None:
    """Go back to the one before."""
    for table in ("alerts", "pages", "totals"):
        op.drop_table(table)
    op.drop_index("events_by_kind", "events")
    op.drop_index("runs_by_change", "runs")
    op.drop_index("runs_uncounted", "runs")
    # In place, on SQLite too: a rewritten table ("batch") is dropped in between, and other tables' rows point at it.
    for column in ("counted_seconds", "counted_status", "cause"):
        op.drop_column("runs", column)
