"""The first row of the debug dashboard: whether the runs are fine, in one glance.

The tiles hold the worst of all chosen runs in large digits; the table below them says which run it is. Both are about
all ranks, whichever are chosen: a NaN on rank 7 is no less bad while one looks at rank 0.
"""

from __future__ import annotations

from dashboards.colours import BAD, GOOD, LOSS, NEUTRAL, PLAIN, WARN
from dashboards.page import RUN_PAGE, RUNBOOKS
from dashboards.panels import RUN, Query, Size, limits, number
from dashboards.tables import Column, rows
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_TILE, _RUNS, _ALERTS = Size(3, 4), Size(17, 6), Size(7, 6)

# A series that is gone falls silent in a comparison, which is the very case to see: it is looked up in the range.
_AGE = f"time() - max by (run_id) (last_over_time(optwatch_last_step_timestamp_seconds{{{RUN}}}[$__range]))"
_PATIENCE = (
    f"clamp_min(10 * sum by (run_id) (optwatch_step_duration_seconds_sum{{{RUN}}})"
    f" / sum by (run_id) (optwatch_step_duration_seconds_count{{{RUN}}}), 120)"
)
# From worst to best, so that the least is the verdict on several runs.
_STATUS = (
    f"3 * (time() - max by (run_id) (optwatch_last_step_timestamp_seconds{{{RUN}}}) < bool {_PATIENCE})"
    f" or 2 * max by (run_id) (optwatch_run_info{{{RUN}}})"
    f" or max by (run_id) (last_over_time(optwatch_run_info{{{RUN}}}[$__range]))"
)
_STATUS_TEXTS: list[model.ValueMapping] = [
    model.ValueMap(
        {
            "0": model.ValueMappingResult(text="stalled", color=BAD, index=0),
            "1": model.ValueMappingResult(text="gone", color=NEUTRAL.main, index=1),
            "2": model.ValueMappingResult(text="starting", color=NEUTRAL.main, index=2),
            "3": model.ValueMappingResult(text="stepping", color=GOOD, index=3),
        }
    )
]
_NOT_A_NUMBER: list[model.ValueMapping] = [
    model.SpecialValueMap(
        model.DashboardSpecialValueMapOptions(
            match=model.SpecialValueMatch("nan"), result=model.ValueMappingResult(text="NaN", color=BAD, index=0)
        )
    )
]
_STEP = f"max by (run_id) (optwatch_steps_total{{{RUN}}})"
_LOSS = f"avg by (run_id) (optwatch_loss{{{RUN}}})"
_NONFINITE = f"max by (run_id) (optwatch_nonfinite_total{{{RUN}}})"
_SPIKES = f"sum by (run_id) (optwatch_spikes_total{{{RUN}}})"
_FIRING = f'ALERTS{{alertstate="firing", {RUN}}}'
_STALE = limits((60, WARN), (300, BAD))
_NEVER, _RARELY = limits((1, BAD)), limits((1, WARN))


def panels() -> list[Builder[model.Panel]]:
    """Eight numbers, then what the runs are and which alerts fire."""
    return [
        number(
            101,
            "Status",
            "The worst of the chosen runs. Good: stepping. Stalled: no step for ten times the mean step time, and at "
            "least two minutes. Gone: not scraped any more, because it finished or died; its run page knows which.",
            Query(f"min({_STATUS})", "status"),
            unit="none",
            thresholds=limits(base=NEUTRAL.main),
            size=_TILE,
            mappings=_STATUS_TEXTS,
            filled=True,
        ),
        number(
            102,
            "Firing alerts",
            "Good: 0. Alerts that fire now for the chosen runs; they are listed below with their runbooks.",
            Query(
                f"count(max by (alertname, run_id) ({_FIRING}))"
                f" or 0 * max(last_over_time(optwatch_run_info{{{RUN}}}[$__range]))",
                "alerts",
            ),
            unit="none",
            thresholds=_NEVER,
            size=_TILE,
            filled=True,
        ),
        number(
            103,
            "Non-finite steps",
            "Good: 0. Steps with a NaN or Inf since the process began, by the source that saw most. "
            "Where it began stands under 'Layers and memory'.",
            Query(f"sum({_NONFINITE})", "steps"),
            unit="locale",
            thresholds=_NEVER,
            size=_TILE,
            filled=True,
        ),
        number(
            104,
            "Since last step",
            "Good: about one step time. Yellow from one minute, red from five: training stalls, or the run ended.",
            Query(f"max({_AGE})", "age"),
            unit="s",
            thresholds=_STALE,
            size=_TILE,
            decimals=0,
        ),
        number(
            105,
            "Loss now",
            "Good: a number, lower than an hour ago; the mean over ranks, and over runs if several. "
            "NaN when any of them is.",
            Query(f"avg({_LOSS})", "loss"),
            unit="none",
            thresholds=limits(base=LOSS.main),
            size=_TILE,
            decimals=3,
            mappings=_NOT_A_NUMBER,
        ),
        number(
            106,
            "Step",
            "Optimizer steps since attach, of the run that is furthest. Good: it grows between two refreshes.",
            Query(f"max({_STEP})", "step"),
            unit="locale",
            thresholds=limits(base=PLAIN),
            size=_TILE,
        ),
        number(
            107,
            "Spikes",
            "Good: 0, or a few that the loss recovered from. Jumps of loss and gradient norm since the process began.",
            Query(f"sum({_SPIKES})", "spikes"),
            unit="locale",
            thresholds=_RARELY,
            size=_TILE,
        ),
        number(
            108,
            "Agent faults",
            "Good: 0. Faults of the agent, and rows or messages that it dropped: with any, distrust gaps in what is "
            "below. None of them touched training.",
            Query(
                f"sum(optwatch_agent_errors_total{{{RUN}}}) + sum(optwatch_agent_dropped_total{{{RUN}}})",
                "faults",
            ),
            unit="locale",
            thresholds=_RARELY,
            size=_TILE,
        ),
        rows(
            110,
            "Runs",
            "The chosen runs, each with its own verdict. Good: green and stepping, on the device and with the ranks "
            "that you expect. A run id leads to its page.",
            Query(
                f"max by (run_id, optimizer, device, world_size) (last_over_time(optwatch_run_info{{{RUN}}}[$__range]))"
            ),
            Query(_STATUS),
            Query(_STEP),
            Query(_AGE),
            Query(_LOSS),
            Query(_NONFINITE),
            Query(_SPIKES),
            columns={
                "run_id": Column("Run id", links=(("Run page", RUN_PAGE + "${__value.text}"),)),
                "Value #B": Column("Status", 90, mappings=_STATUS_TEXTS),
                "Value #C": Column("Step", 90, unit="locale"),
                "Value #D": Column("Since last step", 120, unit="s", decimals=0, verdict=_STALE),
                "Value #E": Column("Loss", 80, unit="none", decimals=3),
                "Value #F": Column("Non-finite", 90, unit="locale", verdict=_NEVER),
                "Value #G": Column("Spikes", 70, unit="locale", verdict=_RARELY),
                "optimizer": Column("Optimizer", 110),
                "device": Column("Device", 70),
                "world_size": Column("Ranks", 60),
            },
            size=_RUNS,
            no_value="No run is selected",
        ),
        rows(
            111,
            "Alerts that fire",
            "Good: nothing is firing. An alert leads to its runbook.",
            Query(f"max by (alertname, run_id) ({_FIRING})"),
            columns={
                "alertname": Column("Alert", 225, links=(("Runbook", RUNBOOKS + "/${__value.text}"),)),
                "run_id": Column("Run id"),
            },
            size=_ALERTS,
            no_value="Nothing is firing",
        ),
    ]
