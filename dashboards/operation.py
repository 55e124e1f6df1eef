"""Panels of how the run operates: what happened to it, how fast it is, and what watching it costs."""

from __future__ import annotations

from dashboards.colours import ALARM, CAUTION, MOMENT, NEUTRAL, SPEED
from dashboards.panels import RUN, SELECTED, Query, Size, extremes, graph
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_THIRD, _QUARTER, _HALF, _AGENT = Size(8, 7), Size(6, 7), Size(12, 7), Size(6, 7)
_HOOK = f'optwatch_agent_overhead_seconds_total{{{SELECTED}, where="hook"}}'
_HOST = f'optwatch_agent_overhead_seconds_total{{{SELECTED}, where="host"}}'
_STEP_SECONDS = f"optwatch_step_duration_seconds_sum{{{SELECTED}}}"


def events() -> list[Builder[model.Panel]]:
    """Counts of all ranks since the process began: one event is one step up, however far the picture is zoomed out."""
    return [
        graph(
            601,
            "Events by kind",
            "Good: none. Each step up is one event; the run page tells what was seen and what is likely.",
            Query(
                f"sum by (run_id, kind, severity) (optwatch_events_total{{{RUN}}}) > 0",
                "{{run_id}} {{kind}} ({{severity}})",
            ),
            unit="locale",
            colour=CAUTION,
            size=_THIRD,
            steps=True,
            minimum=0,
            decimals=0,
            no_value="No event so far",
        ),
        graph(
            602,
            "Non-finite steps by source",
            "Good: none. A gradient before a loss points at the backward pass or the data, a loss first at the forward "
            "pass; weights mean that the run cannot recover.",
            Query(f"max by (run_id, source) (optwatch_nonfinite_total{{{RUN}}}) > 0", "{{run_id}} {{source}}"),
            unit="locale",
            colour=ALARM,
            size=_THIRD,
            steps=True,
            minimum=0,
            decimals=0,
            no_value="No NaN and no Inf so far",
        ),
        graph(
            603,
            "Spikes and skipped steps",
            "Good: none, or a skipped step now and then while the gradient scaler grows its scale. "
            "Skips in a row: the scale cannot find its level.",
            Query(f"sum by (run_id, signal) (optwatch_spikes_total{{{RUN}}}) > 0", "{{run_id}} {{signal}} spikes"),
            Query(
                f"sum by (run_id, reason) (optwatch_skipped_steps_total{{{RUN}}}) > 0",
                "{{run_id}} skipped: {{reason}}",
            ),
            unit="locale",
            colour=CAUTION,
            size=_THIRD,
            steps=True,
            minimum=0,
            decimals=0,
            dashed="skipped",
            no_value="No spike and no skipped step so far",
        ),
    ]


def speed() -> list[Builder[model.Panel]]:
    """How fast steps and tokens go."""
    buckets = f"sum by (run_id, le) (rate(optwatch_step_duration_seconds_bucket{{{SELECTED}}}[$__rate_interval]))"
    return [
        graph(
            701,
            "Step time, median and 99%",
            "Good: level, the dashed 99% close to the median. A gap between them is stragglers, data loading or "
            "checkpoints. Read off histogram buckets: exact to the bucket.",
            Query(f"histogram_quantile(0.5, {buckets})", "{{run_id}} p50"),
            Query(f"histogram_quantile(0.99, {buckets})", "{{run_id}} p99"),
            unit="s",
            colour=SPEED,
            size=_QUARTER,
            log=2,
            dashed="p99$",
        ),
        graph(
            702,
            "Steps per second",
            "Good: level. 0 is a stall; a slow decline is a leak or a throttled device.",
            Query(f"rate(optwatch_steps_total{{{SELECTED}}}[$__rate_interval])"),
            unit="short",
            colour=SPEED,
            size=_QUARTER,
            minimum=0,
        ),
        graph(
            703,
            "Tokens per second",
            "Good: level, and the same as in runs on the same hardware. Sum over the chosen ranks.",
            Query(f"sum by (run_id) (rate(optwatch_tokens_total{{{SELECTED}}}[$__rate_interval]))", "{{run_id}}"),
            unit="short",
            colour=SPEED,
            size=_QUARTER,
            minimum=0,
            no_value="No tokens were given to monitor.log()",
        ),
        graph(
            704,
            "Backward passes a step",
            "Gradient accumulation. Good: the number you configured; a fraction of it is an epoch's last batch.",
            Query(f"optwatch_accumulation_steps{{{SELECTED}}}"),
            unit="locale",
            colour=SPEED,
            size=_QUARTER,
            steps=True,
            minimum=0,
            decimals=0,
        ),
    ]


def device() -> list[Builder[model.Panel]]:
    """How busy and how full the device is."""
    allocated, reserved, total = (
        f'optwatch_device_memory_bytes{{{SELECTED}, kind="{kind}"}}' for kind in ("allocated", "reserved", "total")
    )
    return [
        graph(
            705,
            "Device utilisation",
            "Share of time in which the device was busy. Good: level and above 80%, alike on all ranks. A rank below "
            "the others waits for data or for them (dashed the highest and the lowest of all); dips at equal distances "
            "are checkpoints or validation.",
            Query(f"optwatch_device_utilization_ratio{{{SELECTED}}}"),
            *extremes(f"optwatch_device_utilization_ratio{{{RUN}}}"),
            unit="percentunit",
            colour=SPEED,
            size=_HALF,
            minimum=0,
            reach=1,
            dashed="est rank$",
            no_value="The device does not tell its utilisation",
        ),
        graph(
            706,
            "Device memory in use",
            "Share of the device's memory held by tensors, and dashed what the allocator keeps. Good: level, and below "
            "the red line at 95%. A climb ends in out of memory; a dashed line far above the solid one is "
            "fragmentation.",
            Query(f"{allocated} / ignoring (kind) {total}"),
            Query(f"{reserved} / ignoring (kind) {total}", "{{run_id}}/{{rank}} reserved"),
            unit="percentunit",
            colour=MOMENT,
            size=_HALF,
            limit=0.95,
            minimum=0,
            reach=1,
            dashed="reserved$",
            no_value="The device does not tell its memory",
        ),
    ]


def agent() -> list[Builder[model.Panel]]:
    """What watching costs, and whether it can be trusted."""
    return [
        graph(
            801,
            "Agent overhead",
            "Share of step time that the agent takes, over the last 64 steps; of several ranks the most. Good: below "
            "the 1% budget (red); beyond it the agent reads less often. The dashed lines are its seconds over those of "
            "training: on the training thread, and on its own threads beside it.",
            Query(f"max by (run_id) (optwatch_agent_overhead_ratio{{{RUN}}})", "{{run_id}} measured"),
            Query(
                f"sum by (run_id) (rate({_HOOK}[$__rate_interval]))"
                f" / sum by (run_id) (rate({_STEP_SECONDS}[$__rate_interval]))",
                "{{run_id}} training thread",
            ),
            Query(
                f"sum by (run_id) (rate({_HOST}[$__rate_interval]))"
                f" / sum by (run_id) (rate({_STEP_SECONDS}[$__rate_interval]))",
                "{{run_id}} own threads",
            ),
            unit="percentunit",
            colour=NEUTRAL,
            size=_AGENT,
            limit=0.01,
            minimum=0,
            reach=0.02,
            dashed="(training thread|own threads)$",
        ),
        graph(
            804,
            "Steps between two readings",
            "Good: 1 for gradients; for weights and moments, dashed, what was asked for, or 10 to 160 in about fifteen "
            "seconds. More: reading that often would cost beyond the budget, and spikes between two readings are not "
            "seen in these numbers.",
            Query(
                f'max by (run_id, what) (optwatch_agent_sampling_interval_steps{{{RUN}, what="gradients"}})',
                "{{run_id}} gradients",
            ),
            Query(
                f'max by (run_id, what) (optwatch_agent_sampling_interval_steps{{{RUN}, what="weights_and_moments"}})',
                "{{run_id}} weights and moments",
            ),
            unit="locale",
            colour=NEUTRAL,
            size=_AGENT,
            steps=True,
            minimum=0,
            decimals=0,
            dashed="weights and moments$",
        ),
        graph(
            802,
            "Agent errors and drops",
            "Good: none. An error never reaches training, but the signal of the part named is missing from then on; "
            "dropped rows are steps this page does not show.",
            Query(f"sum by (run_id, where) (optwatch_agent_errors_total{{{RUN}}}) > 0", "{{run_id}} error: {{where}}"),
            Query(f"sum by (run_id, what) (optwatch_agent_dropped_total{{{RUN}}}) > 0", "{{run_id}} dropped {{what}}"),
            unit="locale",
            colour=CAUTION,
            size=_AGENT,
            steps=True,
            minimum=0,
            decimals=0,
            dashed="dropped",
            no_value="No error and nothing dropped so far",
        ),
        graph(
            803,
            "Undelivered messages",
            "Messages (the run, its events, its end) that wait for the server. Good: 0, or a short hump while the "
            "server restarts; nothing is lost while they wait. A line that stays up: the server is away or refuses.",
            Query(f"sum by (run_id) (optwatch_agent_undelivered_messages{{{RUN}}})", "{{run_id}}"),
            unit="locale",
            colour=CAUTION,
            size=_AGENT,
            steps=True,
            minimum=0,
            reach=5,
            decimals=0,
        ),
    ]
