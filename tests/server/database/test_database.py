import re
import threading
from pathlib import Path

import pytest
from sqlalchemy import text

from optwatch_server.database.engine import Database, default_url, parse_url


def test_the_environment_names_the_database() -> None:
    assert default_url({"OPTWATCH_DATABASE_URL": "postgresql://db/optwatch"}) == "postgresql://db/optwatch"


def test_without_a_name_it_is_a_file_in_the_users_data_folder() -> None:
    assert default_url({"XDG_DATA_HOME": "/data"}) == "sqlite:////data/optwatch/optwatch.sqlite3"
    assert default_url({}) == f"sqlite:///{Path.home()}/.local/share/optwatch/optwatch.sqlite3"


@pytest.mark.parametrize(
    "url", ["postgresql://u:p@db/name", "postgres://u:p@db/name", "postgresql+psycopg2://u:p@db/name"]
)
def test_every_spelling_of_postgresql_gets_the_driver_that_is_installed(url: str) -> None:
    assert parse_url(url).drivername == "postgresql+psycopg"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nonsense", "the database URL cannot be read: use sqlite:////path/to/file.sqlite3 or postgresql://"),
        (
            "mysql://db/name",
            "the database 'mysql' is not supported: use sqlite:////path/to/file.sqlite3 or postgresql://",
        ),
        ("sqlite://", "the database URL 'sqlite://' names no file, and what is kept in memory is lost"),
        ("sqlite:///:memory:", "names no file"),
    ],
)
def test_another_database_is_refused_with_those_that_work(url: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        parse_url(url)


def test_a_password_is_never_shown() -> None:
    database = Database("postgresql://user:secret@db/name")
    assert database.shown == "postgresql://user:***@db/name"


def test_writers_in_several_processes_wait_for_each_other_on_sqlite(tmp_path: Path) -> None:
    # Two databases have two locks and two pools, as two processes would: only SQLite itself keeps them apart.
    first, second = (Database(f"sqlite:///{tmp_path / 'a.sqlite3'}") for _ in range(2))
    with first.write() as session:
        session.execute(text("CREATE TABLE counter (value INTEGER)"))
        session.execute(text("INSERT INTO counter VALUES (0)"))
    failures: list[BaseException] = []

    def count(database: Database) -> None:
        try:
            for _ in range(20):
                with database.write() as session:
                    value = session.scalar(text("SELECT value FROM counter"))
                    session.execute(text("UPDATE counter SET value = :value"), {"value": value + 1})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=count, args=(database,)) for database in (first, second) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    with first.read() as session:
        assert session.scalar(text("SELECT value FROM counter")) == 160
    first.close()
    second.close()


def test_a_block_that_fails_keeps_nothing(live) -> None:
    live.run(name="first")

    def change_and_fail() -> None:
        with live.service.database.write() as session:
            session.execute(text("UPDATE runs SET name = 'changed'"))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        change_and_fail()
    assert live.client.get("/api/v1/runs/run-1").json()["name"] == "first"
