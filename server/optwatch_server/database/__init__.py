"""The database: tables, migrations, and what SQLite and PostgreSQL spell differently."""
