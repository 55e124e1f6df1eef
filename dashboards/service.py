"""The last row of the on-call dashboard: whether what it shows can be trusted."""

from __future__ import annotations

from dashboards.colours import BAD, CAUTION, GOOD, NEUTRAL, SPEED
from dashboards.fleet import CHOSEN
from dashboards.panels import Query, Size, graph, limits, number
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

SERIES_BUDGET = 200
"""Series that a rank may have: what an agent promises for any model."""

_TILE, _THIRD = Size(4, 6), Size(8, 6)
_UP: list[model.ValueMapping] = [
    model.ValueMap(
        {
            "0": model.ValueMappingResult(text="down", color=BAD, index=0),
            "1": model.ValueMappingResult(text="up", color=GOOD, index=1),
        }
    )
]


def panels() -> list[Builder[model.Panel]]:
    """The server, then the agents."""
    return [
        number(
            301,
            "Server",
            "Whether Prometheus reaches the server's metrics. Good: up. Down: runs that die now are not found lost.",
            Query("max(optwatch_server_info) or vector(0)", "up"),
            unit="none",
            thresholds=limits(base=NEUTRAL.main),
            size=_TILE,
            mappings=_UP,
            filled=True,
        ),
        graph(
            302,
            "Since the last sweep for lost runs",
            "Good: a few seconds. Above the red line at 30 s a lost run is seen too late.",
            Query("time() - max(optwatch_server_last_sweep_timestamp_seconds)", "age"),
            Query("max(increase(optwatch_server_sweep_errors_total[$__rate_interval])) > 0", "failed sweeps"),
            unit="s",
            colour=SPEED,
            size=Size(7, 6),
            limit=30,
            minimum=0,
            reach=40,
        ),
        graph(
            303,
            "Pages sent at once, an hour",
            "Critical events that the server hands to Alertmanager itself. Good: none failed; what fails comes later, "
            "by Prometheus' rules.",
            Query(
                "3600 * sum by (result) (rate(optwatch_server_alertmanager_sends_total[$__rate_interval]))",
                "{{result}}",
            ),
            unit="short",
            colour=NEUTRAL,
            fixed={"ok": NEUTRAL.tones[3], "failed": BAD},
            size=Size(6, 6),
            minimum=0,
            reach=1,
            no_value="OPTWATCH_ALERTMANAGER_URL is not set",
        ),
        graph(
            304,
            "HTTP errors a second",
            "Answers of the server by status, 4xx and 5xx. Good: none. 5xx: events wait on the runs' disks; "
            "4xx: an agent of another version, or a missing token.",
            Query(
                'sum by (status) (rate(optwatch_server_requests_total{status=~"[45].."}[$__rate_interval])) > 0',
                "{{status}}",
            ),
            unit="reqps",
            colour=CAUTION,
            fixed={},
            size=Size(7, 6),
            minimum=0,
            no_value="No request failed",
        ),
        graph(
            305,
            "Undelivered messages by run",
            "Messages that wait for the server. Good: 0, or a short hump. Nothing is lost while they wait.",
            Query(f"sum by (run_id) (optwatch_agent_undelivered_messages {CHOSEN})", "{{run_id}}"),
            unit="locale",
            colour=CAUTION,
            size=_THIRD,
            steps=True,
            minimum=0,
            reach=5,
            decimals=0,
        ),
        graph(
            306,
            "Agent errors and drops by run",
            "Good: none. None of them touched training, but signals of that run are missing.",
            Query(f"sum by (run_id, where) (optwatch_agent_errors_total {CHOSEN}) > 0", "{{run_id}} error: {{where}}"),
            Query(f"sum by (run_id, what) (optwatch_agent_dropped_total {CHOSEN}) > 0", "{{run_id}} dropped {{what}}"),
            unit="locale",
            colour=CAUTION,
            size=_THIRD,
            steps=True,
            minimum=0,
            decimals=0,
            dashed="dropped",
            no_value="No error and nothing dropped",
        ),
        graph(
            307,
            "Series of a rank, most by run",
            f"Good: below the red line, the budget of {SERIES_BUDGET} a rank, whatever the model. Above it a label "
            "grows without bound, and Prometheus pays.",
            Query(f"max by (run_id) (optwatch:run_rank_series:max {CHOSEN})", "{{run_id}}"),
            unit="locale",
            colour=NEUTRAL,
            size=_THIRD,
            limit=SERIES_BUDGET,
            minimum=0,
            reach=SERIES_BUDGET * 1.1,
            decimals=0,
            no_value="The rules in alerts/rules/service.yaml are not loaded",
        ),
    ]
