"""INSERT ... ON CONFLICT, which both databases have and SQLAlchemy spells twice."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from .models import Base

Insert = postgresql.Insert | sqlite.Insert


def insert_into(session: Session, table: type[Base]) -> Insert:
    """Return an INSERT that can say ``on_conflict_do_nothing`` and ``on_conflict_do_update``.

    A check before an insert is a race between two retries; a unique key and this are not.
    """
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def replace(insert: Insert, keys: Sequence[str], columns: Sequence[str]) -> Insert:
    """Return the INSERT that overwrites `columns` of the row which already has these `keys`."""
    return insert.on_conflict_do_update(
        index_elements=list(keys), set_={column: insert.excluded[column] for column in columns}
    )
