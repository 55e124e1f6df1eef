"""Rows of the executive dashboard about money and device hours, and what failures took of them."""

from __future__ import annotations

from dashboards.colours import BAD, NEUTRAL, STATUSES, WARN
from dashboards.fleet import run_column
from dashboards.panels import Query, Size, graph, limits
from dashboards.promises import over
from dashboards.tables import Column, rows
from dashboards.weekly import LOST, within
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_COST = "optwatch_fleet_cost_total"
_DEVICE = "optwatch_fleet_device_seconds_total"
_RUN_COST = within("optwatch_fleet_run_cost", "run_id, project, team")
_BUDGET = within("optwatch_fleet_run_cost_budget", "run_id")
_CAUSE = (
    f"({within('optwatch_fleet_run_failed', 'run_id, cause')}"
    f' or label_replace(max by (run_id) ({LOST}), "cause", "lost", "", ""))'
)
_NO_RATE = "No cost: set cost_per_device_hour on runs, or OPTWATCH_COST_PER_DEVICE_HOUR on the server"


def cost() -> list[Builder[model.Panel]]:
    """The costliest runs against their budgets, the days, and the month."""
    return [
        rows(
            401,
            "Cost per run, the eight costliest",
            "Runs that were alive within the range shown, in the currency of cost_per_device_hour. Good: below 80% of "
            "the budget until the run is nearly done.",
            Query(f"topk(8, {_RUN_COST})"),
            Query(f"{_BUDGET} and on (run_id) topk(8, {_RUN_COST})"),
            Query(f"{within('optwatch_fleet_run_cost', 'run_id')} / {_BUDGET} and on (run_id) topk(8, {_RUN_COST})"),
            columns={
                "Value #A": Column("Cost", 80, unit="short", decimals=1),
                "Value #B": Column("Budget", 80, unit="short", decimals=1),
                "Value #C": Column("Used", 80, unit="percentunit", decimals=0, verdict=limits((0.8, WARN), (1, BAD))),
                "run_id": run_column(),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
            },
            size=Size(10, 10),
            no_value=_NO_RATE,
        ),
        graph(
            402,
            "Cost a day, by how runs ended",
            "Cost counts on the day on which a run ends. Good: level, and green.",
            Query(over(_COST, "1d", by="status"), "{{status}}"),
            unit="short",
            colour=NEUTRAL,
            fixed=STATUSES,
            size=Size(7, 10),
            stacked=True,
            minimum=0,
            daily=True,
            bars=True,
            no_value=_NO_RATE,
        ),
        graph(
            403,
            "Cost of the 30 days before",
            "The monthly bill, day by day, and what of it went into runs that failed or were lost. Good: as planned, "
            "the red far below. Too low where Prometheus has kept less than 30 days.",
            Query(over(_COST, "30d"), "all runs"),
            Query(over(_COST, "30d", 'status=~"failed|lost"'), "failed or lost"),
            unit="short",
            colour=NEUTRAL,
            fixed={"all runs": NEUTRAL.tones[3], "failed or lost": STATUSES["failed"]},
            size=Size(7, 10),
            minimum=0,
            daily=True,
            no_value=_NO_RATE,
        ),
    ]


def devices() -> list[Builder[model.Panel]]:
    """Where device time went, and what failures took of it."""
    return [
        graph(
            501,
            "Device hours a day, by how runs ended",
            "Devices × time, counted on the day on which a run ends. Good: green.",
            Query(over(_DEVICE, "1d", by="status") + " / 3600", "{{status}}"),
            unit="short",
            colour=NEUTRAL,
            fixed=STATUSES,
            size=Size(9, 8),
            stacked=True,
            minimum=0,
            daily=True,
            bars=True,
            no_value="No run ended",
        ),
        rows(
            502,
            "Device hours by how runs ended",
            "Over the range shown. Good: failed and lost below 5%.",
            Query(f"sort_desc({over(_DEVICE, '$__range', by='status')} / 3600 > 0)"),
            Query(
                f"{over(_DEVICE, '$__range', by='status')} / on () group_left () ({over(_DEVICE, '$__range')} > 0) > 0"
            ),
            Query(over("optwatch_fleet_runs_ended_total", "$__range", by="status") + " > 0"),
            columns={
                "status": Column("Ended as"),
                "Value #A": Column("Device hours", 110, unit="locale", decimals=0),
                "Value #B": Column("Share", 80, unit="percentunit", decimals=1),
                "Value #C": Column("Runs", 70, unit="locale", decimals=0),
            },
            size=Size(7, 8),
            no_value="No run ended",
        ),
        rows(
            503,
            "What failures cost, by cause",
            "Runs that failed within the range shown, and their cost, which is their device hours times their rate. "
            "Good: empty. The largest line is what to fix first.",
            Query(
                f"sort_desc(sum by (cause) ({within('optwatch_fleet_run_cost', 'run_id')}"
                f" * on (run_id) group_right () {_CAUSE}))"
            ),
            Query(over("optwatch_fleet_failures_total", "$__range", by="cause") + " > 0"),
            columns={
                "cause": Column("Cause"),
                "Value #A": Column("Cost", 100, unit="short", decimals=1),
                "Value #B": Column("Runs", 70, unit="locale", decimals=0),
            },
            size=Size(8, 8),
            no_value="No run failed",
        ),
    ]
