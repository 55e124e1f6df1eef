"""PromQL about all runs at once, which the executive and the on-call dashboard share."""

from __future__ import annotations

from dashboards.page import RUN_PAGE
from dashboards.tables import Column

PROJECT = 'project=~"$project"'
"""Matcher of the server's series about runs, which carry the project themselves."""
CHOSEN = f"and on (run_id) optwatch_run_info{{{PROJECT}}}"
"""Keeps the agent's series of the chosen project; they carry no project of their own."""

# One row a run even where its ranks disagree about its name: a plain join would fail for every run.
_OWNERS = (
    "topk by (run_id) (1, group by (run_id, run, project, team)"
    f" (last_over_time(optwatch_fleet_run_started_timestamp_seconds{{{PROJECT}}}[$__range])))"
)


def firing(notify: str) -> str:
    """Since when each alert of a kind (``page`` or ``ticket``) fires, with the run's project and team.

    Rules may leave out whose the run is: the server's own series tell. Where these are missing, the alert's own labels
    do. Alerts about no run at all concern every project: a server that is down is shown whichever is chosen.
    """
    alerts = f'ALERTS{{alertstate="firing", notify="{notify}"'
    return (
        f"max by (alertname, run_id) (ALERTS_FOR_STATE and ignoring (alertstate) {alerts}}})"
        f" * on (run_id) group_left (project, team) {_OWNERS}"
        " or on (alertname, run_id) max by (alertname, run_id, project, team)"
        f" (ALERTS_FOR_STATE and ignoring (alertstate) {alerts}, {PROJECT}}})"
        " or on (alertname, run_id) max by (alertname)"
        f' (ALERTS_FOR_STATE and ignoring (alertstate) {alerts}, run_id="", project=""}})'
    )


def paging() -> str:
    """Runs for which a page fires."""
    return 'max by (run_id) (ALERTS{alertstate="firing", notify="page", run_id!=""})'


def run_column(width: int | None = None) -> Column:
    """The run's id, which begins with its name and leads to its pages."""
    return Column(
        "Run",
        width,
        links=(
            ("What the server knows of it", RUN_PAGE + "${__value.text}"),
            ("Debug dashboard", "/d/optwatch-debug?var-run_id=${__value.text}"),
        ),
    )
