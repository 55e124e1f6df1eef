"""Every metric of the server, as data: what /metrics serves and what dashboards, alerts and docs are checked against.

The agent has a catalogue of the same form. Only the standard library is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]
Cadence = Literal["every step", "sampled", "at change", "host"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its full name as scraped, and what a reader has to know to use it."""

    name: str
    kind: Kind
    unit: str
    """Base unit: ``seconds``, ``steps``, or ``1`` where there is none."""
    help: str
    labels: tuple[str, ...] = ()
    """Labels, in the order in which they are exported."""
    values: tuple[tuple[str, ...], ...] = ()
    """Closed value set of each label in `labels`; an empty tuple for one that only the fleet knows."""
    cadence: Cadence = "host"
    cost: str = "none: the server takes it"
    """What taking it costs the training step."""


RUN_LABELS = ("run_id", "run", "project", "team")
"""Labels of every series that is about one run; project and team are empty where the run gave none."""
STATUSES = ("running", "lost", "succeeded", "failed", "cancelled")
ENDS = ("succeeded", "failed", "cancelled", "lost")
"""What the totals count as an end; a lost run that comes back is counted as recovered, not taken back."""
CAUSES = ("crashed", "out_of_memory", "nonfinite")
"""Kinds of critical events that tell why a run failed."""
PATHS = ("direct", "prometheus")
SENDS = ("ok", "failed")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other")
DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of optwatch_server_request_duration_seconds, in seconds."""
PAGE_BUCKETS = (1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0)
"""Upper bounds of optwatch_fleet_time_to_page_seconds, in seconds."""

_ANY_RUN = ((), (), (), ())

METRICS: tuple[Metric, ...] = (
    Metric("optwatch_server_info", "gauge", "1", "Constant 1; the label is the deployed version.", ("version",), ((),)),
    Metric(
        "optwatch_server_requests_total",
        "counter",
        "1",
        "HTTP requests answered, by route template (none where no route fitted), method and status code.",
        ("route", "method", "status"),
        ((), METHODS, ()),
    ),
    Metric(
        "optwatch_server_request_duration_seconds",
        "histogram",
        "seconds",
        "Time from the first byte of a request to the last of its answer.",
    ),
    Metric(
        "optwatch_server_last_sweep_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time of the last sweep for lost runs that worked; if it stands still, no lost run is seen.",
    ),
    Metric(
        "optwatch_server_sweep_errors_total",
        "counter",
        "1",
        "Sweeps for lost runs that failed since the server started.",
    ),
    Metric("optwatch_fleet_runs", "gauge", "1", "Runs the server knows, by status.", ("status",), (STATUSES,)),
    Metric(
        "optwatch_fleet_run_status",
        "gauge",
        "1",
        "1 for the status the run has; for 24 hours after it was lost or ended.",
        (*RUN_LABELS, "status"),
        (*_ANY_RUN, STATUSES),
    ),
    Metric(
        "optwatch_fleet_run_lost",
        "gauge",
        "1",
        "1 while the run is lost, for up to 24 hours, and 0 while it is running.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_failed",
        "gauge",
        "1",
        "1 for 24 hours after the run ended as failed, by cause.",
        (*RUN_LABELS, "cause"),
        (*_ANY_RUN, (*CAUSES, "unknown")),
    ),
    Metric(
        "optwatch_fleet_run_event_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time at which the server received the run's latest event of that kind; at most 32 kinds a run.",
        (*RUN_LABELS, "kind"),
        (*_ANY_RUN, ()),
    ),
    Metric(
        "optwatch_fleet_run_started_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time, by the agent's clock, at which the run started.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_ended_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time, by the agent's clock, at which the run ended; for 24 hours, and absent before.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_last_heartbeat_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time, by the server's clock, of the last heartbeat from any rank of a running or lost run.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_last_step",
        "gauge",
        "steps",
        "Highest step that any rank of a running or lost run last reported.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_promised_until_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time, the latest of all ranks, by which a running run promised to be back; absent without a promise.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_cost",
        "gauge",
        "1",
        "Device hours of the run so far times the cost of one, in the currency of the rate; absent without a rate.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_run_cost_budget",
        "gauge",
        "1",
        "What the run may cost (its tag cost_budget), in the currency of the rate.",
        RUN_LABELS,
        _ANY_RUN,
    ),
    Metric(
        "optwatch_fleet_runs_ended_total",
        "counter",
        "1",
        "Runs that ended or were lost. One that comes back stays counted as lost and counts as recovered.",
        ("project", "status"),
        ((), ENDS),
    ),
    Metric(
        "optwatch_fleet_runs_recovered_total",
        "counter",
        "1",
        "Lost runs that were heard of again, by a heartbeat or by their end.",
        ("project",),
        ((),),
    ),
    Metric(
        "optwatch_fleet_failures_total",
        "counter",
        "1",
        "Runs that failed or were lost, by cause.",
        ("project", "cause"),
        ((), (*CAUSES, "lost", "unknown")),
    ),
    Metric(
        "optwatch_fleet_run_seconds_total",
        "counter",
        "seconds",
        "Wall time of runs that ended; up to the last heartbeat under lost, where a run was lost on its way.",
        ("project", "status"),
        ((), ENDS),
    ),
    Metric(
        "optwatch_fleet_device_seconds_total",
        "counter",
        "seconds",
        "Device time (world size times wall time) of runs that ended, divided as the wall time is.",
        ("project", "status"),
        ((), ENDS),
    ),
    Metric(
        "optwatch_fleet_cost_total",
        "counter",
        "1",
        "Cost of the device time of runs that ended, in the currency of the rate; runs without a rate add nothing.",
        ("project", "status"),
        ((), ENDS),
    ),
    Metric(
        "optwatch_fleet_time_to_page_seconds",
        "histogram",
        "seconds",
        "Time from an event, or from a run being found lost, to Alertmanager taking the page (direct), or to its "
        "webhook telling the server of an alert that Prometheus raised (prometheus).",
        ("path",),
        (PATHS,),
    ),
    Metric(
        "optwatch_server_alertmanager_sends_total",
        "counter",
        "1",
        "Requests that sent pages to an Alertmanager, by whether it took them.",
        ("result",),
        (SENDS,),
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}
