"""The second row of the on-call dashboard: what ended badly, what can wait, and the loss of what alerts."""

from __future__ import annotations

from dashboards.colours import GRADIENT, LOSS, NEUTRAL, STATUSES
from dashboards.fleet import CHOSEN, PROJECT, firing, run_column
from dashboards.page import RUNBOOKS
from dashboards.panels import Query, Size, graph
from dashboards.tables import Column, rows
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_TABLE, _THIRD = Size(12, 7), Size(8, 7)
_ENDED = f"max by (run_id, project, team) (optwatch_fleet_run_ended_timestamp_seconds{{{PROJECT}}})"
_FAILED = f"max by (run_id, cause) (optwatch_fleet_run_failed{{{PROJECT}}})"
_LOST = (
    f"max by (run_id, project, team) (optwatch_fleet_run_last_heartbeat_timestamp_seconds{{{PROJECT}}})"
    " and on (run_id) optwatch_fleet_run_lost == 1"
)
_GONE = f'{_ENDED} * on (run_id) group_left (cause) {_FAILED} or label_replace({_LOST}, "cause", "lost", "", "")'
# Those that alerted at any time shown, looked up at its end, so that a line is whole and not only there while it fires.
_ALERTED = 'and on (run_id) last_over_time(ALERTS{alertstate="firing", notify="page"}[$__range] @ end())'


def panels() -> list[Builder[model.Panel]]:
    """Tables of what failed and of tickets, then curves of what alerts."""
    return [
        rows(
            201,
            "Runs that failed or were lost within 24 hours, latest first",
            "Good: none. Several with one cause in the same minutes are one incident: a node, a disk, a release.",
            Query(f"sort_desc(1000 * ({_GONE}))"),
            Query(f"max by (run_id) (last_over_time(optwatch_steps_total[1d])) and on (run_id) ({_GONE})"),
            columns={
                "Value #A": Column("When", 135, unit="dateTimeFromNow"),
                "cause": Column("Cause", 120),
                "run_id": run_column(),
                "Value #B": Column("Steps", 90, unit="locale"),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
            },
            size=_TABLE,
            no_value="No run failed and none was lost",
        ),
        rows(
            202,
            "Tickets that fire, newest first",
            "Good: none, or known. They page nobody; an alert leads to its runbook.",
            Query(f"sort_desc(1000 * ({firing('ticket')}))"),
            columns={
                "Value": Column("Since", 135, unit="dateTimeFromNow"),
                "alertname": Column("Alert: what to do", 250, links=(("Runbook", RUNBOOKS + "/${__value.text}"),)),
                "run_id": run_column(),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
            },
            size=_TABLE,
            no_value="Nothing is firing",
        ),
        graph(
            203,
            "Loss of runs that paged",
            "Good: falls, and falls again after a jump. A gap is a NaN; an end is a run that died.",
            Query(f"avg by (run_id) (optwatch_loss {CHOSEN}) {_ALERTED}", "{{run_id}}"),
            unit="sci",
            colour=LOSS,
            size=_THIRD,
            log=2,
            no_value="No run with a page sends its loss",
        ),
        graph(
            204,
            "Gradient norm of runs that paged",
            "Good: a level band up to the page. What climbs before it is the cause; what jumps with it, a symptom.",
            Query(f"max by (run_id) (optwatch_grad_norm {CHOSEN}) {_ALERTED}", "{{run_id}}"),
            unit="sci",
            colour=GRADIENT,
            size=_THIRD,
            log=2,
            no_value="No run with a page sends its gradient norm",
        ),
        graph(
            205,
            "Runs by status",
            "Good: no step up of failed or lost. Those that ended count for 24 hours.",
            Query(
                f"count by (status) (max by (run_id, status) (optwatch_fleet_run_status{{{PROJECT}}}))", "{{status}}"
            ),
            unit="locale",
            colour=NEUTRAL,
            fixed=STATUSES,
            size=_THIRD,
            steps=True,
            minimum=0,
            decimals=0,
            no_value="The server's metrics are missing",
        ),
    ]
