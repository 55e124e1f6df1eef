"""Brings a database to this version's tables. The migrations travel inside the package."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from .engine import Database

_LOCK = 7_233_001  # any number, as long as every replica takes the same


def alembic_config(connection: Connection) -> Config:
    """Return Alembic's configuration for an open connection: no ini file has to be found."""
    config = Config()
    config.set_main_option(
        "script_location", str(Path(__file__).resolve().parents[1] / "migrations").replace("%", "%%")
    )
    config.attributes["connection"] = connection
    return config


def migrate(database: Database) -> bool:
    """Upgrade the database to this version's tables; return False where a newer server has been there already.

    Replicas that start together take turns: on PostgreSQL by an advisory lock, on SQLite by its write lock. A newer
    schema is left as it is, because a server must run on the schema of the next version during a rollout.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database cannot be reached, or refused a migration.
    """
    with database.engine.begin() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        config = alembic_config(connection)
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        present = MigrationContext.configure(connection).get_current_revision()
        if present is not None and present not in known:
            return False
        command.upgrade(config, "head")
    return True
