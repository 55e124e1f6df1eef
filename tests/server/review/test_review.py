"""The weekly review counts every run once, and its sums are exact, on both databases."""

from __future__ import annotations

import dataclasses
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optwatch_server.database.engine import Database
from optwatch_server.database.models import AlertRow, EventRow, RankRow, RunRow, TagRow
from optwatch_server.review import figures as reviews
from optwatch_server.review.figures import BAD, OUTCOMES, Review
from optwatch_server.review.report import escaped, hours, main, money, percent, render, target
from optwatch_server.review.weeks import SECONDS, Week, parse_week, week_of
from optwatch_server.runs.lives import Use
from optwatch_server.shipped import shipped

WEEK = Week(1_699_833_600)  # 2023-W46
NOW = WEEK.end + 3600.0
DAY, HOUR = 86_400, 3600
HOSTILE = "<script>|[x](http://evil)\n# `*_~"


def run(run_id: str, **fields: Any) -> RunRow:
    """A run that began on Tuesday at 00:00 and succeeded ten hours later on two devices, unless told otherwise."""
    began = fields.pop("started_at", WEEK.begin + DAY)
    ended = fields.pop("ended_at", began + 10 * HOUR)
    status = fields.pop("status", "succeeded")
    defaults: dict[str, Any] = {
        "name": run_id,
        "project": "nlp",
        "team": "research",
        "created_at": began,
        "optimizer": "",
        "hyperparameters": {},
        "device": "",
        "world_size": 2,
        "versions": {},
        "code_version": "",
        "host": "",
        "heartbeat_interval_seconds": 10.0,
        "status_since": began if status == "running" else ended,
        "lost_at": ended if status == "lost" else None,
        "lost_reason": "rank 0 fell silent" if status == "lost" else "",
        "finished_at": None if status in ("running", "lost") else ended,
        "reason": "CUDA error" if status == "failed" else "",
        "cause": "crashed" if status == "failed" else "",
    }
    return RunRow(id=run_id, started_at=began, status=status, **{**defaults, **fields})


def rank(run_id: str, received_at: float) -> RankRow:
    return RankRow(
        run_id=run_id, rank=0, received_at=received_at, interval_seconds=10, promise_reason="", due_at=0, latest={}
    )


def tag(run_id: str, value: str) -> TagRow:
    return TagRow(run_id=run_id, name="cost_per_device_hour", value=value)


def alert(run_id: str, starts_at: float, received_at: float, name: str = "TrainingNonFinite") -> AlertRow:
    return AlertRow(
        fingerprint=f"{run_id}-{name}",
        starts_at=starts_at,
        run_id=run_id,
        alertname=name,
        severity="critical",
        status="firing",
        received_at=received_at,
        summary="",
        description="",
    )


def event(run_id: str, occurred_at: float) -> EventRow:
    return EventRow(
        id=f"{run_id}-{occurred_at}",
        run_id=run_id,
        rank=0,
        sequence=0,
        kind="nonfinite",
        severity="critical",
        occurred_at=occurred_at,
        received_at=occurred_at,
        summary="",
        likely="",
        runbook="",
        details={},
    )


def reviewed(database: Database, *rows: Any, week: Week = WEEK, now: float = NOW, **options: Any) -> Review:
    with database.write() as session:
        session.add_all([row for row in rows if isinstance(row, RunRow)])
        session.flush()
        session.add_all([row for row in rows if not isinstance(row, RunRow)])
    with database.read() as session:
        return reviews.review(session, week, now, target=Decimal("0.95"), **options)


def test_a_week_is_known_by_its_name_and_a_moment_by_its_week() -> None:
    assert str(WEEK) == "2023-W46"
    assert parse_week("2023-W46", NOW) == WEEK == week_of(WEEK.begin) == week_of(WEEK.end - 0.1)
    assert week_of(WEEK.end) == WEEK.before(-1)
    assert str(week_of(1_609_459_200)) == "2020-W53"  # 1 January 2021
    assert parse_week("2020-W53", NOW).end == parse_week("2021-W01", NOW).begin


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("2023-46", "week '2023-46' does not exist: give an ISO week from 1970 on, such as 2023-W46"),
        ("2023-W54", "week '2023-W54' does not exist"),
        ("2023-W00", "week '2023-W00' does not exist"),
        ("0001-W01", "week '0001-W01' does not exist"),
        ("1970-W01", "week '1970-W01' does not exist"),
        ("２０２３-W46", "does not exist"),
        ("2023-W48", "week 2023-W48 has not begun: the newest is 2023-W47, and the last complete one 2023-W46"),
    ],
)
def test_a_week_that_cannot_be_reviewed_is_named_with_one_that_can(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_week(text, NOW)


def test_the_success_rate_leaves_cancelled_and_running_runs_out(database: Database) -> None:
    good = [run(f"s{number}") for number in range(17)]
    found = reviewed(
        database,
        *good,
        run("f", status="failed"),
        run("l", status="lost"),
        run("c", status="cancelled"),
        run("r", status="running"),
        run("o", status="failed", started_at=WEEK.begin - 40 * DAY, created_at=WEEK.begin - 40 * DAY),
    )
    assert found.outcomes == {"succeeded": 17, "failed": 1, "lost": 1, "cancelled": 1}
    assert dataclasses.astuple(found.success) == (17, 2, round(17 / 19, 6), round(2 / (0.05 * 19), 6))
    assert found.period == found.success
    assert found.objective == 0.95


def test_a_run_counts_where_it_ended_and_its_time_is_split_at_the_border(database: Database) -> None:
    before = WEEK.begin - 2 * HOUR
    rows = (
        run("early", status="failed", started_at=before, ended_at=WEEK.begin + 3 * HOUR),
        run("late", started_at=WEEK.end - HOUR, ended_at=WEEK.end + 5 * HOUR),
    )
    now = WEEK.end + DAY
    found = reviewed(database, *rows, now=now)
    assert found.outcomes == {"succeeded": 0, "failed": 1, "lost": 0, "cancelled": 0}
    (project,) = found.projects
    assert project.by_outcome["failed"] == Use(1, 3 * HOUR, 6 * HOUR, 0, 6 * HOUR)
    assert project.by_outcome["running"] == Use(1, HOUR, 2 * HOUR, 0, 2 * HOUR)
    (cause,) = found.causes
    assert (cause.in_week.device_seconds, cause.in_all.device_seconds) == (6 * HOUR, 10 * HOUR)
    weeks = [reviewed(database, week=WEEK.before(back), now=now).total.device_seconds for back in (1, 0, -1)]
    assert weeks == [4 * HOUR, 8 * HOUR, 10 * HOUR]


@pytest.mark.parametrize(("ended", "counted"), [(WEEK.end - 1, 1), (WEEK.end, 0), (WEEK.begin, 1), (WEEK.begin - 1, 0)])
def test_the_first_second_of_a_week_belongs_to_it_and_the_first_of_the_next_does_not(
    database: Database, ended: int, counted: int
) -> None:
    assert reviewed(database, run("r", started_at=ended - HOUR, ended_at=ended)).outcomes["succeeded"] == counted


def test_a_lost_run_uses_time_until_its_last_heartbeat_and_counts_when_it_was_called_lost(database: Database) -> None:
    began, lost = WEEK.begin - 5 * HOUR, WEEK.begin + 30
    found = reviewed(
        database,
        run("border", status="lost", started_at=began, ended_at=lost),
        rank("border", WEEK.begin - HOUR),
    )
    assert found.outcomes["lost"] == 1
    (border,) = found.failures
    assert (border.run_seconds, border.ended_at, border.cause) == (4 * HOUR, lost, "lost")
    assert border.reason == "rank 0 fell silent"


def test_what_is_cut_at_the_present_moment_is_said_to_be_incomplete(database: Database) -> None:
    now = WEEK.begin + DAY + 4 * HOUR + 0.7
    found = reviewed(database, run("r", status="running"), run("later"), now=now)
    assert (found.complete, found.until) == (False, int(now))
    assert found.total.run_seconds == 8 * HOUR
    assert found.outcomes["succeeded"] == 0


def test_all_sums_are_exact_however_they_are_cut(database: Database) -> None:
    random_ = random.Random(7)
    rows: list[Any] = []
    for number in range(300):
        status = random_.choice(OUTCOMES)
        began = WEEK.begin + random_.uniform(-20 * DAY, 6.9 * DAY)
        ended = began + random_.expovariate(1 / (2 * DAY))
        name, project = f"run-{number:03}", random_.choice(["a", "b", ""])
        rows.append(
            run(
                name,
                status=status,
                started_at=began,
                ended_at=ended,
                project=project,
                world_size=random_.choice([None, 1, 3, 8]),
            )
        )
        rows.append(rank(name, random_.uniform(began, ended)))
        if number % 3:
            rows.append(tag(name, random_.choice(["0.013", "2.5", "1e-3", "nonsense", "-1"])))
    now = WEEK.end + 20 * DAY
    found = reviewed(database, *rows, now=now, default_rate=0.37)
    assert [project.project for project in found.projects] == ["", "a", "b"]
    for project in found.projects:
        assert project.total == sum(project.by_outcome.values(), Use())
        assert project.wasted == sum((project.by_outcome[outcome] for outcome in BAD), Use())
        alone = reviewed(database, now=now, default_rate=0.37, project=project.project)
        assert alone.projects == [project]
    assert found.total == sum((project.total for project in found.projects), Use())
    assert found.wasted == sum((project.wasted for project in found.projects), Use())
    assert sum(found.outcomes[status] for status in BAD) == len(found.failures) == found.success.bad
    assert sum(cause.failures for cause in found.causes) == found.success.bad
    assert sum(cause.in_all.device_seconds for cause in found.causes) == sum(
        failure.device_seconds for failure in found.failures
    )
    assert sum((cause.in_week for cause in found.causes), Use()).cost_cents == found.wasted.cost_cents
    weeks = [WEEK.before(back) for back in range(10, -10, -1) if WEEK.before(back).begin < now]
    over_weeks = [reviewed(database, week=week, now=now, default_rate=0.37).total for week in weeks]
    whole = [life.use(0, int(now)) for life in _lives(database, int(now))]
    for field in ("run_seconds", "device_seconds", "cost_cents"):
        assert sum(getattr(use, field) for use in over_weeks) == sum(getattr(use, field) for use in whole), field
    by_week = {point.week: point for point in found.trend}
    assert list(by_week) == ["2023-W43", "2023-W44", "2023-W45", "2023-W46"]
    for back in range(4):
        of_week = reviewed(database, week=WEEK.before(back), now=now, default_rate=0.37)
        point = by_week[of_week.week]
        assert (point.success, point.total) == (of_week.success, of_week.total)


def _lives(database: Database, now: int) -> list[Any]:
    from optwatch_server.runs.lives import lives

    with database.read() as session:
        return lives(session, 0, now, None, 0.37)


def test_cost_comes_from_the_tag_or_the_servers_rate_and_what_has_none_is_named(database: Database) -> None:
    found = reviewed(database, run("tagged"), tag("tagged", "2.5"), run("plain", status="failed"))
    assert found.total == Use(2, 20 * HOUR, 40 * HOUR, 5000, 20 * HOUR)
    assert found.wasted.cost_cents == 0
    with_rate = reviewed(database, default_rate=0.1)
    assert (with_rate.total.cost_cents, with_rate.wasted.cost_cents) == (5200, 200)
    assert with_rate.total.unpriced_device_seconds == 0


def test_failures_are_listed_by_what_they_used_and_the_slowest_by_how_long_they_ran(database: Database) -> None:
    rows = [run(f"r{number}", ended_at=WEEK.begin + DAY + number * HOUR) for number in range(1, 8)]
    bad = [
        run("small", status="failed", cause="out_of_memory", world_size=1),
        run("large", status="failed", cause="", world_size=8),
        run("nan", status="failed", cause="nonfinite", world_size=2),
    ]
    found = reviewed(database, *rows, *bad)
    assert [failure.id for failure in found.failures] == ["large", "nan", "small"]
    assert [cause.cause for cause in found.causes] == ["unknown", "nonfinite", "out_of_memory"]
    assert [run.id for run in found.slowest] == ["large", "nan", "small", "r7", "r6"]


def test_time_to_page_is_from_the_event_to_the_webhook(database: Database) -> None:
    began = WEEK.begin + DAY
    rows: list[Any] = [run("r", status="lost", ended_at=began + HOUR)]
    for number in range(1, 100):
        rows += [
            run(f"n{number}"),
            event(f"n{number}", began + 5),
            alert(f"n{number}", began + 6, began + 5 + number / 2),
        ]
    rows.append(alert("r", began + HOUR + 5, began + HOUR + 100, "TrainingRunLost"))
    rows.append(alert("n1", WEEK.end, WEEK.end + 1, "TrainingCrashed"))
    paging = reviewed(database, *rows).paging
    assert (paging.pages, paging.p50_seconds, paging.p99_seconds, paging.in_time) == (100, 25.0, 49.5, 90)
    assert paging.by_alert == {"TrainingNonFinite": 99, "TrainingRunLost": 1}


def test_an_alert_whose_event_is_not_known_is_timed_from_its_own_begin(database: Database) -> None:
    began = WEEK.begin + DAY
    rows = (run("a"), alert("a", began, began + 9), event("a", began - 700), alert("a", began, began + 3, "Other"))
    paging = reviewed(database, *rows).paging
    assert (paging.p50_seconds, paging.p99_seconds) == (3.0, 9.0)


@pytest.mark.parametrize("form", ["markdown", "html", "json"])
def test_the_same_rows_and_clock_give_the_same_bytes_in_whatever_order_they_came(database: Database, form: str) -> None:
    rows: list[Any] = [run(f"r{number}", status=OUTCOMES[number % 4]) for number in range(12)]
    first = render(reviewed(database, *rows), form, public_url="https://optwatch.example", now=NOW)
    with database.write() as session:
        for row in session.query(RunRow).all():
            session.delete(row)
    again = [run(f"r{number}", status=OUTCOMES[number % 4]) for number in reversed(range(12))]
    assert render(reviewed(database, *again), form, public_url="https://optwatch.example", now=NOW) == first
    assert first.count("https://optwatch.example/runs/r") == (0 if form == "json" else 11)


def test_json_has_every_number_and_markdown_the_ones_people_ask_for(database: Database) -> None:
    found = reviewed(database, run("good"), run("bad", status="failed", reason="CUDA error: | ECC"), default_rate=1.0)
    document = json.loads(render(found, "json", public_url="", now=NOW))
    assert document["week"] == "2023-W46"
    assert document["total"]["device_seconds"] == 40 * HOUR
    text = render(found, "markdown", public_url="https://o.example", now=NOW)
    assert text.startswith("# Training review 2023-W46\n\n2023-11-13 00:00:00 UTC to 2023-11-19 23:59:59 UTC\n\n")
    assert "| this week | 1 | 1 | 50% | 1000% |" in text
    assert "| crashed | 1 | 20:00:00 | 20:00:00 |" in text
    assert "| [bad](https://o.example/runs/bad) | nlp | research | crashed | 20:00:00 |" in text
    assert "CUDA error: \\| ECC |" in text
    assert "| **all** | 20:00:00 | 20:00:00 | 0:00:00 | 0:00:00 | 0:00:00 | 40:00:00 | 20:00:00 | 20:00:00 |" in text
    assert "| 40.00 | 20.00 |" in text
    assert "split at the border" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_an_empty_week_says_what_to_do(database: Database) -> None:
    found = reviewed(database)
    text = render(found, "markdown", public_url="https://o.example", now=NOW)
    assert "No run ran in this week. A run appears here once an agent" in text
    assert "`optwatch review --week 2023-W45`" in text
    assert "| 2023-W46 | 0 | 0 | – | 0:00:00 | 0:00:00 | 0.00 |" in text


def test_what_a_user_supplies_cannot_leave_its_cell(database: Database) -> None:
    found = reviewed(database, run("r", name=HOSTILE, project=HOSTILE, team=HOSTILE, status="failed", reason=HOSTILE))
    text = render(found, "markdown", public_url="https://o.example", now=NOW)
    assert "<script>" not in text
    assert "](http://evil)" not in text.replace("\\](http", "")
    html = render(found, "html", public_url="https://o.example", now=NOW)
    assert "<script>" not in html


def test_numbers_are_shown_so_that_they_can_be_added_up() -> None:
    assert [hours(value) for value in (0, 59, 3600, 360_061)] == ["0:00:00", "0:00:59", "1:00:00", "100:01:01"]
    assert [money(value) for value in (0, 5, 123_456)] == ["0.00", "0.05", "1234.56"]
    assert [percent(value) for value in (None, 0, 0.5, 0.9996, 1, 0.975)] == [
        "–",
        "0%",
        "50%",
        "99.9%",
        "100%",
        "97.5%",
    ]
    assert escaped("a|b\n#c") == "a\\|b \\#c"


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_hours_as_shown_add_up_exactly(left: int, right: int) -> None:
    def read(text: str) -> int:
        hour, minute, second = map(int, text.split(":"))
        return hour * 3600 + minute * 60 + second

    assert read(hours(left)) + read(hours(right)) == read(hours(left + right))


def test_the_bound_of_a_page_in_time_is_that_of_the_objective() -> None:
    spec = shipped("alerts") / "slo" / "time-to-page.yaml"
    assert f'le=~"{reviews.PAGE_SECONDS:g}([.]0)?"' in spec.read_text()
    assert target() == Decimal("0.95")


def test_the_command_prints_a_week_of_a_database(
    database_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from optwatch_server.database.migration import migrate

    database = Database(database_url)
    migrate(database)
    reviewed(database, run("r-1"))
    database.close()
    monkeypatch.setenv("OPTWATCH_PUBLIC_URL", "https://o.example/base/")
    arguments = ["--database-url", database_url]
    assert main([*arguments, "--week", "2023-W46"], clock=lambda: NOW) == 0
    explicit = capsys.readouterr().out
    assert "(https://o.example/base/runs/r-1)" in explicit
    assert main(arguments, clock=lambda: NOW) == 0
    assert capsys.readouterr().out == explicit
    assert main([*arguments, "--project", "none"], clock=lambda: NOW) == 0
    assert "No run ran in this week in project none" in capsys.readouterr().out
    assert main([*arguments, "--format", "html"], clock=lambda: NOW) == 0
    assert 'href="https://o.example/base/runs/r-1"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--week", "47"], "week '47' does not exist: give an ISO week from 1970 on, such as 2023-W46"),
        (["--database-url", "sqlite:////nowhere/a.sqlite3"], "/nowhere"),
        (["--database-url", "mysql://db/x"], "the database 'mysql' is not supported"),
        (["--public-url", "optwatch"], "--public-url or $OPTWATCH_PUBLIC_URL is 'optwatch' and is no http"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value_and_the_fix(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    database = [] if "--database-url" in arguments else ["--database-url", f"sqlite:///{tmp_path / 'a.sqlite3'}"]
    assert main([*database, *arguments], clock=lambda: NOW) == 1
    error = capsys.readouterr().err
    assert error.startswith("optwatch review: ")
    assert told in error
    assert error.count("\n") == 1


def test_a_database_that_is_not_there_or_not_migrated_is_told_and_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "none.sqlite3"
    assert main(["--database-url", f"sqlite:///{file}"], clock=lambda: NOW) == 1
    assert f"there is no database at {file}: check --database-url or $OPTWATCH_DATABASE_URL" in capsys.readouterr().err
    assert not file.exists()
    file.touch()
    assert main(["--database-url", f"sqlite:///{file}"], clock=lambda: NOW) == 1
    assert "start `optwatch server` of this version on it once, which migrates it" in capsys.readouterr().err


def test_the_page_shows_a_week_and_leads_to_those_around_it(small: Any) -> None:
    with small.service.database.write() as session:
        session.add(run("r-1", name=HOSTILE, status="failed"))
    small.clock.now = NOW
    page = small.page("/review")
    assert page.status_code == 200
    assert page.text == small.page("/review/2023-W46").text
    for link in ("/runs/r-1", "/review/2023-W45", "/review/2023-W47"):
        assert f'href="{link}"' in page.text
    assert "<script>" not in page.text
    assert 'href="/review/2023-W45?project=a%26b"' in small.page("/review/2023-W46?project=a%26b").text
    assert small.client.get("/review/2023-W46?format=json").json()["success"]["bad"] == 1
    markdown = small.client.get("/review/2023-W46?format=markdown")
    assert markdown.headers["content-type"].startswith("text/markdown")
    assert "this week has not ended yet" in small.page("/review/2023-W47").text
    assert "No run ran in this week" in small.page("/review/2023-W01").text


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/review/2023-W60", 404, "week '2023-W60' does not exist: give an ISO week from 1970 on"),
        ("/review/2023-W46?format=pdf", 422, "format is 'pdf': choose one of markdown, json, html"),
    ],
)
def test_a_page_that_cannot_be_is_a_problem_with_the_fix(small: Any, path: str, status: int, told: str) -> None:
    answer = small.client.get(path)
    assert answer.status_code == status
    assert told in answer.json()["detail"]


def test_a_week_has_604800_seconds_in_utc_whatever_summer_time_does() -> None:
    assert WEEK.end - WEEK.begin == SECONDS == 604_800
