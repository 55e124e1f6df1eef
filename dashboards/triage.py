"""The first screen of the on-call dashboard."""

from __future__ import annotations

from dashboards.colours import ALARM, BAD, GOOD, GRADIENT, NEUTRAL, PLAIN, WARN
from dashboards.fleet import CHOSEN, PROJECT, firing, paging, run_column
from dashboards.heatmaps import shares
from dashboards.page import RUNBOOKS
from dashboards.panels import Query, Size, graph, limits, number
from dashboards.tables import Column, rows
from grafana_foundation_sdk.builders.stat import Panel as Tile
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_TILE, _PAGES, _RUNS, _HEAT = Size(3, 3), Size(13, 9), Size(11, 9), Size(8, 7)
_NEVER, _RARELY = limits((1, BAD)), limits((1, WARN))

# Where the server's series are missing, nothing is known: "no data" is then the honest text, and not a green 0.
_KNOWN = "0 * max(optwatch_fleet_runs)"
_STATUS_TEXTS: list[model.ValueMapping] = [
    model.ValueMap(
        {
            "0": model.ValueMappingResult(text="lost", color=ALARM.tones[2], index=0),
            "1": model.ValueMappingResult(text="paging", color=BAD, index=1),
            "2": model.ValueMappingResult(text="paused", color=NEUTRAL.main, index=2),
            "3": model.ValueMappingResult(text="running", color=GOOD, index=3),
        }
    )
]
_WATCHER_TEXTS: list[model.ValueMapping] = [
    model.ValueMap({"-1": model.ValueMappingResult(text="down", color=BAD, index=0)})
]
_BEAT = f"max by (run_id) (optwatch_fleet_run_last_heartbeat_timestamp_seconds{{{PROJECT}}})"
# A counter whose first sample is above 0, of a run that spiked before its first scrape, does not increase: it is new.
_SPIKES = 'optwatch_spikes_total{signal="grad_norm"}'
_SPIKED = (
    f"increase({_SPIKES}[$__range] @ end()) > 0"
    f" or (max_over_time({_SPIKES}[$__range] @ end()) > 0 unless {_SPIKES} @ end() offset $__range)"
)
_ALLOCATED, _TOTAL = (f'optwatch_device_memory_bytes{{kind="{kind}"}}' for kind in ("allocated", "total"))


def _status() -> str:
    """From worst to best, so that a sorted table begins with what needs somebody."""

    def runs(status: str) -> str:
        return f'optwatch_fleet_run_status{{{PROJECT}, status="{status}"}}'

    promised = "max by (run_id) (optwatch_fleet_run_promised_until_timestamp_seconds) > time()"
    return (
        "sort(max by (run_id, team) ("
        f"0 * {runs('lost')}"
        f" or {runs('running')} and on (run_id) {paging()}"
        f" or 2 * {runs('running')} and on (run_id) ({promised})"
        f" or 3 * {runs('running')}))"
    )


def _within_a_day(panel_id: int, title: str, description: str, kind: str) -> Tile:
    """How many runs had an event of this kind in the last 24 hours."""
    times = f'max by (run_id) (optwatch_fleet_run_event_timestamp_seconds{{{PROJECT}, kind="{kind}"}})'
    query = Query(f"count({times} > time() - 86400) or {_KNOWN}", "runs")
    return number(panel_id, title, description, query, unit="locale", thresholds=_NEVER, size=_TILE)


def tiles() -> list[Builder[model.Panel]]:
    """Eight numbers; the first and the last say whether the rest needs to be read, and whether it can be trusted."""
    return [
        number(
            101,
            "Pages firing",
            "Good: 0. Each is one alert of one run, listed below with its runbook.",
            Query(f"count({firing('page')}) or {_KNOWN}", "pages"),
            unit="locale",
            thresholds=_NEVER,
            size=_TILE,
            filled=True,
        ),
        number(
            102,
            "Tickets firing",
            "Good: few. They wait for the morning; the next row lists them.",
            Query(f"count({firing('ticket')}) or {_KNOWN}", "tickets"),
            unit="locale",
            thresholds=_RARELY,
            size=_TILE,
        ),
        _within_a_day(103, "NaN, 24 h", "Good: 0. Runs that computed NaN or Inf in the last 24 hours.", "nonfinite"),
        _within_a_day(104, "OOM, 24 h", "Good: 0. Runs that ran out of memory in the last 24 hours.", "out_of_memory"),
        _within_a_day(105, "Crashed, 24 h", "Good: 0. Runs that raised an error in the last 24 hours.", "crashed"),
        number(
            106,
            "Lost, 24 h",
            "Good: 0. Runs that fell silent in the last 24 hours without a word and have not come back.",
            Query(f"sum(max by (run_id) (optwatch_fleet_run_lost{{{PROJECT}}})) or {_KNOWN}", "runs"),
            unit="locale",
            thresholds=_NEVER,
            size=_TILE,
        ),
        number(
            107,
            "Runs now",
            "Runs that send heartbeats. Good: as many as were started.",
            Query(
                f'count(max by (run_id) (optwatch_fleet_run_status{{{PROJECT}, status="running"}})) or {_KNOWN}', "runs"
            ),
            unit="locale",
            thresholds=limits(base=PLAIN),
            size=_TILE,
        ),
        number(
            108,
            "Last sweep",
            "How long ago the server looked for lost runs. Good: below 15 s. Down or red: nothing on this page that "
            "the server knows is current, and a lost run is not seen.",
            Query("time() - max(optwatch_server_last_sweep_timestamp_seconds) or vector(-1)", "age"),
            unit="s",
            thresholds=limits((15, WARN), (30, BAD)),
            size=_TILE,
            decimals=0,
            mappings=_WATCHER_TEXTS,
        ),
    ]


def panels() -> list[Builder[model.Panel]]:
    """Numbers, then pages beside runs, then what the devices did and whose gradients jumped."""
    return [
        *tiles(),
        rows(
            110,
            "Pages that fire, newest first",
            "Good: nothing is firing. An alert leads to its runbook, which says what to do first; a run leads to what "
            "the server knows of it.",
            Query(f"sort_desc(1000 * ({firing('page')}))"),
            columns={
                "Value": Column("Since", 135, unit="dateTimeFromNow"),
                "alertname": Column("Alert: what to do", 250, links=(("Runbook", RUNBOOKS + "/${__value.text}"),)),
                "run_id": run_column(),
                "project": Column("Project", 90),
                "team": Column("Team", 90),
            },
            size=_PAGES,
            no_value="Nothing is firing",
        ),
        rows(
            111,
            "Runs now, worst first",
            "Good: green and running, a beat within 30 s, steps that go on. Lost: silent without a word. Paging: "
            "alive, and a page fires. Paused: said that it would be silent, as for a long checkpoint.",
            Query(_status()),
            Query(f"max by (run_id) (optwatch_fleet_run_last_step{{{PROJECT}}})"),
            Query(f"time() - {_BEAT}"),
            Query(
                "time() - max by (run_id) (last_over_time(optwatch_last_step_timestamp_seconds[$__range]))"
                f" and on (run_id) {_BEAT}"
            ),
            columns={
                "Value #A": Column("Status", 80, mappings=_STATUS_TEXTS),
                "run_id": run_column(),
                "team": Column("Team", 90),
                "Value #B": Column("Step", 85, unit="locale"),
                "Value #C": Column("Last beat", 85, unit="s", decimals=0, verdict=limits((30, WARN), (60, BAD))),
                "Value #D": Column("Last step", 85, unit="s", decimals=0, verdict=limits((120, WARN), (300, BAD))),
            },
            size=_RUNS,
            no_value="No run is alive",
        ),
        shares(
            120,
            "Device utilisation by run and rank",
            "Good: all alike, at the far end of the scale. Another shade waits or hangs; a row that ends is a run that "
            "ended or died.",
            f"optwatch_device_utilization_ratio {CHOSEN}",
            scheme="YlOrBr",
            size=_HEAT,
        ),
        shares(
            121,
            "Device memory by run and rank",
            "Share held by tensors. Good: level, and short of the far end of the scale: a row that goes there is about "
            "to run out.",
            f"{_ALLOCATED} / ignoring (kind) {_TOTAL} {CHOSEN}",
            scheme="Purples",
            size=_HEAT,
        ),
        graph(
            122,
            "Gradient norm of runs that spiked",
            "Runs whose gradient norm jumped within this time range. Good: none, or jumps that come back by "
            "themselves within seconds.",
            Query(
                f"max by (run_id) (optwatch_grad_norm {CHOSEN}) and on (run_id) ({_SPIKED})",
                "{{run_id}}",
            ),
            unit="sci",
            colour=GRADIENT,
            size=_HEAT,
            log=2,
            no_value="No gradient norm jumped",
        ),
    ]
