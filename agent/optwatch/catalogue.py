"""Every metric of the agent, as data. The exporter registers it; dashboards, alerts and docs are checked against it.

A metric is named here once, in full, so that one grep finds every use of it. Only the standard library is imported.
Every sample also carries ``run_id`` and ``rank``, and ``optimizer`` where one run watches several.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]
Cadence = Literal["every step", "sampled", "at change", "host"]

COMMON_LABELS = ("run_id", "rank")
"""Labels of every sample. ``optimizer`` joins them where one run watches several optimizers."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: its full name as scraped, and what a reader has to know to use it."""

    name: str
    kind: Kind
    unit: str
    """Base unit: ``seconds``, ``bytes``, ``ratio``, ``steps``, ``tokens``, or ``1`` where there is none."""
    help: str
    labels: tuple[str, ...] = ()
    """Labels beside `COMMON_LABELS`, in the order in which they are exported."""
    values: tuple[tuple[str, ...], ...] = ()
    """Closed value set of each label in `labels`; an empty tuple for one that only the run knows (layer, group)."""
    cadence: Cadence = "every step"
    cost: str = "none: a number the host already has"
    """What taking it costs the training step."""


_READ_G = "one read of the gradients, shared by all gradient statistics"
_READ_P = "one read of the weights in each rotation, a part at a time"
_COPY_P = "one copy and one read of the weights, on sampled steps; in four rotations where they exceed the scratch"
_READ_M = "one read of the first moments in each rotation, a part at a time"
_READ_V = "one read of the second moments in each rotation, a part at a time"

EVENT_SEVERITIES = {
    "nonfinite": "critical",
    "divergence": "critical",
    "out_of_memory": "critical",
    "crashed": "critical",
    "resumed_without_state": "critical",
    "loss_spike": "warning",
    "grad_spike": "warning",
    "drift": "warning",
    "plateau": "warning",
    "stall": "warning",
    "validation_regression": "warning",
    "schedule_jump": "warning",
    "checkpoint_failed": "warning",
    "audit_finding": "warning",
    "memory_forecast": "warning",
    "replica_divergence": "critical",
    "rank_mismatch": "warning",
    "straggler": "warning",
}
"""Kinds of event that the agent raises, each with its severity."""
GRADED_EVENTS = {"audit_finding": ("critical", "warning")}
"""Kinds whose events differ in harm: each event says which of these severities it has, or has its kind's."""


def severities(kind: str) -> tuple[str, ...]:
    """Every severity that an event of this kind may have."""
    return GRADED_EVENTS.get(kind, (EVENT_SEVERITIES[kind],))


SHARD_QUANTITIES = (
    "gradient_squares",
    "gradient_before_clip_squares",
    "weight_squares",
    "first_moment_squares",
    "second_moment",
    "second_moment_entries",
    "epsilon_dominated_entries",
)
"""What is added up over ranks in Prometheus, where they do not do it themselves."""
AUDIT_RULES = (
    "coupled-weight-decay",
    "epsilon-too-small",
    "half-precision-weights",
    "beta1-too-large",
    "lion-rate",
    "adam-rate",
    "decay-too-strong",
    "momentum-too-large",
    "capturable-on-cpu",
    "differentiable",
    "slow-loop",
    "sgd-on-attention",
    "parameter-in-no-group",
    "parameter-in-two-groups",
    "shared-storage",
    "tie-broken",
    "empty-group",
    "frozen-parameters",
    "decay-inverted",
    "decay-on-norms-and-biases",
    "decay-on-embeddings",
    "muon-on-embeddings",
    "learning-rate-zero",
    "no-warm-up",
    "peak-rate-from-step-1",
    "clipping-absent",
    "accumulation-undivided",
    "second-moment-memory",
    "model-in-evaluation-mode",
    "layer-without-gradient",
    "schedule-free-with-scheduler",
)
"""Rules of the configuration's audit (docs/audit.md), by id."""
NONFINITE_SOURCES = ("loss", "gradient", "moment", "weight")
DURATION_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of optwatch_step_duration_seconds, in seconds."""

METRICS: tuple[Metric, ...] = (
    Metric(
        "optwatch_run_info",
        "gauge",
        "1",
        "Constant 1; its labels describe the run. Join on run_id to name what another series is about.",
        ("run", "project", "team", "optimizer", "device", "world_size", "version", "sweep"),
        ((), (), (), (), (), (), (), ()),
        "at change",
    ),
    Metric("optwatch_steps_total", "counter", "steps", "Optimizer steps taken since attach."),
    Metric(
        "optwatch_last_step_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time at which the last optimizer step was taken; time() minus this is how long training has stood still.",
    ),
    Metric(
        "optwatch_loss",
        "gauge",
        "1",
        "Loss of the last step, unscaled, over all its micro-batches; NaN and Inf are exported as they are.",
        cost="one scalar addition per backward()",
    ),
    Metric(
        "optwatch_reported",
        "gauge",
        "1",
        "Last value given to monitor.log(), by name.",
        ("name",),
        ((),),
        "host",
    ),
    Metric(
        "optwatch_grad_norm",
        "gauge",
        "1",
        "L2 norm of all gradients as the optimizer used them (at_step) and before clip_grad_norm_ (before_clip).",
        ("stage",),
        (("at_step", "before_clip"),),
        cost=_READ_G + "; one more where clip_grad_norm_ runs",
    ),
    Metric(
        "optwatch_weight_norm", "gauge", "1", "L2 norm of all weights after the step.", cadence="sampled", cost=_READ_P
    ),
    Metric(
        "optwatch_update_norm",
        "gauge",
        "1",
        "L2 norm of what steps changed in the weights: copies before a step compared with the weights after it, in the "
        "tensors that the optimizer was given. All of one step where these fit Settings.update_scratch_bytes; larger "
        "ones in turn, the latest change of every part, exported once all have been measured.",
        cadence="sampled",
        cost=_COPY_P,
    ),
    Metric(
        "optwatch_update_ratio",
        "gauge",
        "ratio",
        "Norm of the measured update over the L2 norm of the same weights after the same steps. Of weights that the "
        "model uses: an optimizer's own master weights are state.",
        cadence="sampled",
        cost=_COPY_P,
    ),
    Metric(
        "optwatch_learning_rate",
        "gauge",
        "1",
        "Learning rate used by the last step, by parameter group.",
        ("group",),
        ((),),
    ),
    Metric(
        "optwatch_weight_decay",
        "gauge",
        "1",
        "Weight decay used by the last step, by parameter group.",
        ("group",),
        ((),),
    ),
    Metric(
        "optwatch_effective_learning_rate",
        "summary",  # its quantiles only: Prometheus keeps the label `quantile` for summaries
        "1",
        "Quantiles over layers of lr / (sqrt(mean(v / (1 - beta2^t))) + eps): the rate after scaling by v.",
        ("quantile",),
        (("0.1", "0.5", "0.9"),),
        "sampled",
        _READ_V,
    ),
    Metric(
        "optwatch_first_moment_norm",
        "gauge",
        "1",
        "L2 norm of the first moments (momentum), raw as stored.",
        cadence="sampled",
        cost=_READ_M,
    ),
    Metric(
        "optwatch_second_moment_mean",
        "gauge",
        "1",
        "Mean entry of the second moments, raw as stored.",
        cadence="sampled",
        cost=_READ_V,
    ),
    Metric(
        "optwatch_second_moment_max",
        "gauge",
        "1",
        "Largest entry of the second moments, raw as stored.",
        cadence="sampled",
        cost=_READ_V,
    ),
    Metric(
        "optwatch_epsilon_dominated_ratio",
        "gauge",
        "ratio",
        "Share of entries whose sqrt(v / (1 - beta2^t)) is below eps: there the update has lost its adaptivity.",
        cadence="sampled",
        cost=_READ_V,
    ),
    Metric(
        "optwatch_grad_moment_cosine",
        "gauge",
        "ratio",
        "Cosine between the gradient and the first moment before the step: near 0 is noise, negative is a turn.",
        cadence="sampled",
        cost="one more read of gradients and first moments, on sampled steps",
    ),
    Metric(
        "optwatch_layer_grad_norm",
        "gauge",
        "1",
        "L2 norm of a layer's gradients at the step.",
        ("layer",),
        ((),),
        cost=_READ_G,
    ),
    Metric(
        "optwatch_layer_weight_norm",
        "gauge",
        "1",
        "L2 norm of a layer's weights after the step.",
        ("layer",),
        ((),),
        "sampled",
        _READ_P,
    ),
    Metric(
        "optwatch_layer_update_ratio",
        "gauge",
        "ratio",
        "L2 norm of the measured change of a layer's weights over the norm of these weights; absent while they are 0.",
        ("layer",),
        ((),),
        "sampled",
        _COPY_P,
    ),
    Metric(
        "optwatch_layer_first_moment_norm",
        "gauge",
        "1",
        "L2 norm of a layer's first moments, raw as stored.",
        ("layer",),
        ((),),
        "sampled",
        _READ_M,
    ),
    Metric(
        "optwatch_layer_second_moment_mean",
        "gauge",
        "1",
        "Mean entry of a layer's second moments, raw as stored.",
        ("layer",),
        ((),),
        "sampled",
        _READ_V,
    ),
    Metric(
        "optwatch_shard_contribution",
        "gauge",
        "1",
        "Sum over this rank's part of the model, where ranks do not add up themselves: sum by (run_id) over the ranks "
        "counts every element once. The square root of a sum of squares is the norm.",
        ("quantity",),
        (SHARD_QUANTITIES,),
        cost="none: what the statistics of the whole model cost",
    ),
    Metric(
        "optwatch_layer_shard_contribution",
        "gauge",
        "1",
        "As optwatch_shard_contribution, by layer.",
        ("layer", "quantity"),
        ((), SHARD_QUANTITIES),
        cost="none: what the statistics of the whole model cost",
    ),
    Metric(
        "optwatch_nonfinite_total",
        "counter",
        "steps",
        "Steps at which a NaN or Inf was seen, by where it was.",
        ("source",),
        (NONFINITE_SOURCES,),
        cost="none: read off the norms, which overflow only for true infinities",
    ),
    Metric(
        "optwatch_nonfinite_first_step",
        "gauge",
        "steps",
        "Step of the first NaN or Inf of the present incident, by where it was; layer is the first bad one. "
        "Born with the incident: what pages is optwatch_nonfinite_total, and this tells the page its step and layer.",
        ("source", "layer"),
        (NONFINITE_SOURCES, ()),
        "host",
    ),
    Metric(
        "optwatch_spikes_total",
        "counter",
        "1",
        "Spikes begun: a jump far outside the recent band, counted once until the signal is back in it.",
        ("signal",),
        (("loss", "grad_norm"),),
        "host",
    ),
    Metric(
        "optwatch_skipped_steps_total",
        "counter",
        "steps",
        "Steps that a gradient scaler skipped: overflow while it looks for its scale, which is no incident; nonfinite "
        "where it finds none: many in a row (Settings.max_skipped_steps), or at a scale too small to overflow.",
        ("reason",),
        (("overflow", "nonfinite"),),
    ),
    Metric(
        "optwatch_events_total",
        "counter",
        "1",
        "Events raised, by kind and severity.",
        ("kind", "severity"),
        (tuple(EVENT_SEVERITIES), tuple(dict.fromkeys(s for kind in EVENT_SEVERITIES for s in severities(kind)))),
        "host",
    ),
    Metric(
        "optwatch_audit_findings",
        "gauge",
        "1",
        "Findings of the configuration's audit, by rule (docs/audit.md); a rule that found nothing is absent.",
        ("rule",),
        (AUDIT_RULES,),
        "at change",
        "none: once at attach, and once after the first 100 steps on the host thread",
    ),
    Metric(
        "optwatch_optimizer_state_bytes",
        "gauge",
        "bytes",
        "Exact bytes the optimizer's state holds, by state key and dtype.",
        ("key", "dtype"),
        ((), ()),
        "at change",
    ),
    Metric(
        "optwatch_optimizer_state_forecast_bytes",
        "gauge",
        "bytes",
        "Bytes that the optimizer's state will come to, found at attach by running its own step() on tensors without "
        "data; what is there already counts. Absent where the class does not run on such tensors.",
        cadence="at change",
        cost="none: once, at attach",
    ),
    Metric(
        "optwatch_step_duration_seconds",
        "histogram",
        "seconds",
        "Time from one optimizer step to the next.",
    ),
    Metric(
        "optwatch_target_by_step",
        "gauge",
        "steps",
        "Optimizer step by which the run is to have reached its target, by the metric that the target is about.",
        ("metric",),
        ((),),
        "at change",
    ),
    Metric(
        "optwatch_target_reached",
        "gauge",
        "1",
        "1 once the run has reached its target, 0 until then.",
        ("metric",),
        ((),),
        "host",
    ),
    Metric(
        "optwatch_checkpoints_total",
        "counter",
        "1",
        "Checkpoints written inside monitor.checkpoint(), by how that ended.",
        ("result",),
        (("succeeded", "failed"),),
        "host",
    ),
    Metric(
        "optwatch_last_checkpoint_timestamp_seconds",
        "gauge",
        "seconds",
        "Unix time at which the last checkpoint was written, or failed to be.",
        ("result",),
        (("succeeded", "failed"),),
        "host",
    ),
    Metric(
        "optwatch_device_memory_bytes",
        "gauge",
        "bytes",
        "Memory of the device: held by tensors (allocated), kept by the allocator (reserved), free, total. On a CPU: "
        "the process's resident memory (allocated and reserved) and the machine's.",
        ("kind",),
        (("allocated", "reserved", "free", "total"),),
        "host",
        "none: read when scraped",
    ),
    Metric(
        "optwatch_device_utilization_ratio",
        "gauge",
        "ratio",
        "Share of time that the device was busy: NVML's figure for a GPU, processor time over cores for a CPU.",
        cadence="host",
        cost="none: read when scraped",
    ),
    Metric("optwatch_tokens_total", "counter", "tokens", "Tokens given to monitor.log(tokens=n).", cadence="host"),
    Metric(
        "optwatch_accumulation_steps",
        "gauge",
        "1",
        "backward() calls that the last step accumulated.",
    ),
    Metric(
        "optwatch_agent_overhead_seconds_total",
        "counter",
        "seconds",
        "Time spent by the agent: on the training thread (hook) and on its own threads (host).",
        ("where",),
        (("hook", "host"),),
    ),
    Metric(
        "optwatch_agent_overhead_ratio",
        "gauge",
        "ratio",
        "Share of step time that the agent takes, hooks and host thread, over the last 64 steps. On CUDA its hooks' "
        "time is that of launching. Not measured where parameters are sharded.",
        cadence="host",
    ),
    Metric(
        "optwatch_agent_sampling_interval_steps",
        "gauge",
        "steps",
        "Steps between two readings: more where steps are short, or where the agent would cost more than its budget.",
        ("what",),
        (("weights_and_moments", "gradients"),),
        cadence="host",
    ),
    Metric(
        "optwatch_agent_errors_total",
        "counter",
        "1",
        "Faults of the agent itself, none of which reached training, by the part that failed.",
        ("where",),
        (("hook", "host", "detector", "sink", "reporter", "spool", "ranks", "exporter"),),
    ),
    Metric(
        "optwatch_agent_dropped_total",
        "counter",
        "1",
        "What the agent could not keep: rows the host thread was too slow for, messages beyond the spool's bound.",
        ("what",),
        (("rows", "messages"),),
    ),
    Metric(
        "optwatch_agent_undelivered_messages",
        "gauge",
        "1",
        "Messages (the run, its events, its end) that wait for the server to take them.",
        cadence="host",
    ),
)

WHOLE_MODEL = (
    "optwatch_grad_norm",
    "optwatch_weight_norm",
    "optwatch_update_norm",
    "optwatch_update_ratio",
    "optwatch_effective_learning_rate",
    "optwatch_first_moment_norm",
    "optwatch_second_moment_mean",
    "optwatch_second_moment_max",
    "optwatch_epsilon_dominated_ratio",
    "optwatch_grad_moment_cosine",
    "optwatch_layer_grad_norm",
    "optwatch_layer_weight_norm",
    "optwatch_layer_update_ratio",
    "optwatch_layer_first_moment_norm",
    "optwatch_layer_second_moment_mean",
)
"""Metrics about all of the model. Where it is on several ranks, rank 0 exports them, and every rank the others."""

RUN_WIDE = {
    "optwatch_audit_findings",
    "optwatch_run_info",
    "optwatch_reported",
    "optwatch_target_by_step",
    "optwatch_target_reached",
    "optwatch_checkpoints_total",
    "optwatch_last_checkpoint_timestamp_seconds",
    "optwatch_device_memory_bytes",
    "optwatch_device_utilization_ratio",
    "optwatch_tokens_total",
    "optwatch_agent_overhead_seconds_total",
    "optwatch_agent_overhead_ratio",
    "optwatch_agent_sampling_interval_steps",
    "optwatch_agent_errors_total",
    "optwatch_agent_dropped_total",
    "optwatch_agent_undelivered_messages",
}
"""Metrics about the run as a whole: they never carry the label ``optimizer``."""

BY_NAME = {metric.name: metric for metric in METRICS}
