"""Panels of what a run would lose if it died now, and of the target it is to reach."""

from __future__ import annotations

from dashboards.colours import BAD, GOOD, NEUTRAL, SPEED, WARN
from dashboards.panels import RUN, Query, Size, graph, limits, number
from dashboards.tables import Column, rows
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_SUCCEEDED, _FAILED = (f'{RUN}, result="{result}"' for result in ("succeeded", "failed"))
_AGE = f"time() - max by (run_id) (optwatch_last_checkpoint_timestamp_seconds{{{_SUCCEEDED}}})"
_OLD = limits((3600, WARN), (4 * 3600, BAD))
_REACHED: list[model.ValueMapping] = [
    model.ValueMap(
        {
            "0": model.ValueMappingResult(text="late", color=BAD, index=0),
            "1": model.ValueMappingResult(text="on its way", color=NEUTRAL.main, index=1),
            "2": model.ValueMappingResult(text="reached", color=GOOD, index=2),
        }
    )
]
_BY_STEP = f"max by (run_id, metric) (optwatch_target_by_step{{{RUN}}})"
_STEP = f"max by (run_id) (optwatch_steps_total{{{RUN}}})"


def panels() -> list[Builder[model.Panel]]:
    """How fresh the last checkpoint is, how often they succeed, and whether the target is reached in time."""
    return [
        number(
            901,
            "Since checkpoint",
            "Since the last good one: what would be lost if the run died now; of several runs, the most. Good: "
            "less than the distance of two checkpoints. Yellow from one hour, red from four.",
            Query(f"max({_AGE})", "age"),
            unit="s",
            thresholds=_OLD,
            size=Size(3, 7),
            decimals=0,
            no_value="none written",
        ),
        graph(
            902,
            "Age of the last good checkpoint",
            "Good: a saw whose teeth are alike; each fall is a checkpoint. A tooth that goes on rising is one that is "
            "late or failed.",
            Query(_AGE, "{{run_id}}"),
            unit="s",
            colour=SPEED,
            size=Size(7, 7),
            minimum=0,
            no_value="No checkpoint was written inside monitor.checkpoint()",
        ),
        graph(
            903,
            "Checkpoints",
            "Counted since the process began; the distance of two steps is their frequency. Good: steps at equal "
            "distances, and no dashed line: it counts those that failed.",
            Query(f"max by (run_id) (optwatch_checkpoints_total{{{_SUCCEEDED}}})", "{{run_id}} succeeded"),
            Query(f"max by (run_id) (optwatch_checkpoints_total{{{_FAILED}}}) > 0", "{{run_id}} failed"),
            unit="locale",
            colour=NEUTRAL,
            size=Size(6, 7),
            steps=True,
            minimum=0,
            decimals=0,
            dashed="failed$",
            no_value="No checkpoint was written inside monitor.checkpoint()",
        ),
        rows(
            904,
            "Target",
            "The step by which each run is to reach its target. Good: reached, or on its way with steps left. "
            "Late: the step has passed without it.",
            Query(_BY_STEP),
            Query(
                f"2 * (max by (run_id, metric) (optwatch_target_reached{{{RUN}}}) == 1)"
                f" or on (run_id, metric) {_BY_STEP} >= bool on (run_id) group_left () {_STEP}"
            ),
            columns={
                "run_id": Column("Run id"),
                "metric": Column("Metric", 90),
                "Value #A": Column("By step", 80, unit="locale"),
                "Value #B": Column("Now", 90, mappings=_REACHED),
            },
            size=Size(8, 7),
            no_value="No target was given",
        ),
    ]
