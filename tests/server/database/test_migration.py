from concurrent.futures import ThreadPoolExecutor

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect, text

from optwatch_server.database.engine import Database
from optwatch_server.database.migration import alembic_config, migrate
from optwatch_server.database.models import Base


@pytest.fixture
def live(database_url: str, clock, serving):
    """A server on a database of its own, which a test may ruin."""
    opened = Database(database_url)
    migrate(opened)
    with serving(opened, clock) as server:
        yield server
    opened.close()


def test_the_migrations_make_what_the_models_say(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_migrating_twice_changes_nothing_and_keeps_the_rows(live) -> None:
    live.run()
    assert migrate(live.service.database)
    assert live.status() == "running"


def test_the_migrations_go_down_and_up_again_with_rows_in_the_tables(live) -> None:
    live.run(tags={"a": "b"})
    live.beat()
    live.events(live.event())
    database = live.service.database
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "base")
    with database.engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    assert migrate(database)
    assert live.run().status_code == 201


def test_servers_that_start_together_migrate_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(migrate, databases)) == [True] * 4
    for database in databases:
        database.close()


def test_the_schema_of_a_newer_server_is_left_as_it_is(live) -> None:
    with live.service.database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'from-the-future'"))
    assert migrate(live.service.database) is False
    assert live.run().status_code == 201


# What the server of schema 1 wrote when a run was made known, was lost and ended: none of the columns that came later.
_OLD_RUN = """
    INSERT INTO runs (id, name, project, team, started_at, created_at, optimizer, hyperparameters, device, world_size,
        versions, code_version, host, heartbeat_interval_seconds, status, status_since, lost_reason, finished_at,
        reason)
    VALUES (:id, 'old', 'p', '', 100, 100, '', '{}', '', 4, '{}', '', '', 10, :status, 150, '', :finished_at, '')
"""


def test_history_enters_the_totals_with_the_migration_and_not_as_a_burst_after_it(
    database_url: str, clock, serving
) -> None:
    database = Database(database_url)
    with database.engine.begin() as connection:
        command.upgrade(alembic_config(connection), "0001")
        for run_id, status, finished_at in (
            ("a", "succeeded", 160),
            ("b", "succeeded", 50),
            ("c", "failed", 130),
            ("d", "lost", None),
            ("e", "running", None),
        ):
            connection.execute(text(_OLD_RUN), {"id": run_id, "status": status, "finished_at": finished_at})
    migrate(database)
    with serving(database, clock) as server:
        values = _counters(server)
        assert values["optwatch_fleet_runs_ended_total", "succeeded"] == 2
        assert values["optwatch_fleet_runs_ended_total", "lost"] == 1
        assert values["optwatch_fleet_run_seconds_total", "succeeded"] == 60
        assert values["optwatch_fleet_device_seconds_total", "failed"] == 120
        assert values["optwatch_fleet_failures_total", "unknown"] == 1
        assert values["optwatch_fleet_failures_total", "lost"] == 1
        server.service.sweeper.sweep()
        assert _counters(server) == values
        server.finish("e", finished_at=110.0)
        server.service.sweeper.sweep()
        assert _counters(server)["optwatch_fleet_runs_ended_total", "succeeded"] == 3
    database.close()


def test_a_server_of_the_version_before_goes_on_working_on_this_schema(live) -> None:
    with live.service.database.write() as session:
        session.execute(text(_OLD_RUN), {"id": "old", "status": "running", "finished_at": None})
        session.execute(text("UPDATE runs SET status = 'failed', finished_at = 140, status_since = 150"))
    live.service.sweeper.sweep()
    assert _counters(live)["optwatch_fleet_failures_total", "unknown"] == 1
    assert _counters(live)["optwatch_fleet_run_seconds_total", "failed"] == 40


def test_every_table_goes_down_to_the_version_before_with_rows_in_it(live) -> None:
    live.run(tags={"a": "b"})
    live.beat()
    live.events(live.event())
    live.finish(status="failed", cause="crashed")
    live.service.sweeper.sweep()
    database = live.service.database
    with database.engine.begin() as connection:
        command.downgrade(alembic_config(connection), "0001")
    with database.engine.connect() as connection:
        assert set(inspect(connection).get_table_names()) == {"alembic_version", "events", "ranks", "run_tags", "runs"}
        for table in ("events", "ranks", "run_tags", "runs"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() == 1
        assert "cause" not in {column["name"] for column in inspect(connection).get_columns("runs")}
    migrate(database)
    assert live.status() == "failed"
    assert _counters(live)["optwatch_fleet_failures_total", "unknown"] == 1


def _counters(live) -> dict[tuple[str, str], float]:
    """Return the counters of project p by name and the other label; the project of this file's other runs is empty."""
    return {
        (sample.name, sample.labels.get("status") or sample.labels.get("cause", "")): sample.value
        for family in live.service.registry.collect()
        for sample in family.samples
        if sample.labels.get("project") in ("p", "") and family.type == "counter"
    }
