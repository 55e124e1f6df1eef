"""Alembic's entry: runs the migrations on the connection that `optwatch_server.database.migration` opened."""

from alembic import context

from optwatch_server.database.models import Base

connection = context.config.attributes["connection"]
# SQLite cannot alter most of a table in place, so that a migration rewrites it there ("batch").
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
