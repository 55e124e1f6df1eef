"""Rows of the executive dashboard about single runs: those to ask about, and what they reached."""

from __future__ import annotations

from dashboards.colours import LOSS
from dashboards.fleet import PROJECT, run_column
from dashboards.panels import Query, Size, graph
from dashboards.tables import Column, rows
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

RECENT = 10
"""Reported values that the validation table has room for."""


def within(metric: str, by: str, matchers: str = "") -> str:
    """The last value of a series about a run within the range shown, which runs that ended have left behind."""
    return f"max by ({by}) (last_over_time({metric}{{{PROJECT}{matchers}}}[$__range]))"


_STARTED, _ENDED = ("optwatch_fleet_run_started_timestamp_seconds", "optwatch_fleet_run_ended_timestamp_seconds")
_RUN = "run_id, project, team"
_DURATION = f"({within(_ENDED, _RUN)} - {within(_STARTED, _RUN)})"
_AGE = f'(time() - {within(_STARTED, _RUN)} and on (run_id) optwatch_fleet_run_status{{status="running"}})'
_FAILED = within("optwatch_fleet_run_failed", "run_id, cause")
LOST = f"({within('optwatch_fleet_run_lost', _RUN)} == 1)"
"""Runs that were lost within the range shown and have not come back."""
_LAST_HEARD = f"({within('optwatch_fleet_run_last_heartbeat_timestamp_seconds', _RUN)} and on (run_id) {LOST})"
_REPORTED = 'optwatch_reported{name=~"val.*"}[$__range]'
_PROJECTS = (
    "topk by (run_id) (1, group by (run_id, project)"
    f" (last_over_time(optwatch_fleet_run_started_timestamp_seconds{{{PROJECT}}}[1d])))"
)
_NEWEST = (
    f"topk({RECENT}, 1000 * group by (run_id, name) (last_over_time({_REPORTED}))"
    f" * on (run_id) group_left (project, team) topk by (run_id) (1, {within(_STARTED, _RUN)}))"
)


def runs() -> list[Builder[model.Panel]]:
    """The five runs that failed last and the five that took longest."""
    return [
        rows(
            201,
            "The five that failed last",
            "Good: none. A run leads to what was seen and what is likely.",
            Query(
                f"topk(5, 1000 * ({within(_ENDED, _RUN)} * on (run_id) group_left (cause) {_FAILED}"
                f' or label_replace({_LAST_HEARD}, "cause", "lost", "", "")))'
            ),
            columns={
                "Value": Column("When", 135, unit="dateTimeFromNow"),
                "run_id": run_column(),
                "cause": Column("Cause", 120),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
            },
            size=Size(12, 7),
            no_value="No run failed",
        ),
        rows(
            202,
            "The five that took longest",
            "Those that run now are among them. Good: runs that are meant to be long.",
            Query(f"topk(5, {_DURATION} or {_AGE})"),
            columns={
                "Value": Column("Duration", 110, unit="s", decimals=1),
                "run_id": run_column(),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
            },
            size=Size(12, 7),
            no_value="No run ended",
        ),
    ]


def validation() -> list[Builder[model.Panel]]:
    """What recent runs reached on their validation sets."""
    kept = f"and on (run_id, name) {_NEWEST}"
    return [
        rows(
            301,
            "Validation of recent runs, newest first",
            "What scripts gave to monitor.log() under a name that begins with val. Good: the last value is the best "
            "one, the lowest for a loss; far from it, the run overfits or was stopped late.",
            Query(_NEWEST),
            Query(f"max by (run_id, name) (last_over_time({_REPORTED})) {kept}"),
            Query(f"min by (run_id, name) (min_over_time({_REPORTED})) {kept}"),
            Query(f"max by (run_id, name) (max_over_time({_REPORTED})) {kept}"),
            columns={
                "Value #A": Column("Started", 135, unit="dateTimeFromNow"),
                "run_id": run_column(),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
                "name": Column("Value", 110),
                "Value #B": Column("Last", 80, unit="none", decimals=4),
                "Value #C": Column("Lowest", 80, unit="none", decimals=4),
                "Value #D": Column("Highest", 80, unit="none", decimals=4),
            },
            size=Size(14, 12),
            no_value="No run reported a value that begins with val",
        ),
        graph(
            302,
            "Lowest validation loss, a day",
            "The best that a run of each project reported that day. Good: falls from week to week.",
            Query(
                'min by (project) (min_over_time(optwatch_reported{name=~"val.*loss"}[1d])'
                f" * on (run_id) group_left (project) {_PROJECTS})",
                "{{project}}",
            ),
            unit="short",
            colour=LOSS,
            size=Size(10, 12),
            daily=True,
            points=True,
            no_value="No run reported a validation loss",
        ),
    ]
