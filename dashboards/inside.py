"""Panels of one run from inside: its layers as heat maps, what its state weighs, and how it was set up."""

from __future__ import annotations

from dashboards.colours import MOMENT
from dashboards.heatmaps import layers
from dashboards.page import RUNBOOKS
from dashboards.panels import RUN, SELECTED, Query, Size, graph, whole
from dashboards.tables import Column, rows
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_LAYERS, _TABLE = Size(12, 11), Size(12, 7)
_LAYER = 'layer=~"$layer"'


def inside_one_run() -> list[Builder[model.Panel]]:
    """The layers of one run as heat maps, what the state weighs, where a NaN began, and what the audit found."""
    return [
        layers(
            501,
            "Gradient norm by layer",
            "Good: neighbours alike, no row that darkens for good (dead) or lights up alone (about to diverge).",
            whole("layer_grad_norm", _LAYER, by="layer", roots="gradient_squares"),
            scheme="Oranges",
            size=_LAYERS,
        ),
        layers(
            502,
            "Weight norm by layer",
            "Good: slow change, the same in all layers of a kind. A row that leaves the others diverges.",
            whole("layer_weight_norm", _LAYER, by="layer", roots="weight_squares"),
            scheme="Greens",
            size=_LAYERS,
        ),
        layers(
            503,
            "First moment norm by layer",
            "Good: the picture of the gradient norm, smoothed. A dark row gets no update.",
            whole("layer_first_moment_norm", _LAYER, by="layer", roots="first_moment_squares"),
            scheme="Purples",
            size=_LAYERS,
        ),
        layers(
            504,
            "Second moment mean by layer",
            "Good: rows that keep their shade. A row that stays bright after a spike has its learning rate held down.",
            whole("layer_second_moment_mean", _LAYER, by="layer", share="second_moment"),
            scheme="Purples",
            size=_LAYERS,
        ),
        layers(
            507,
            "Update over weights by layer",
            "Measured. Good: near 10^-3, alike in layers of a kind. A light row is rewritten, a dark one does not "
            'learn: both want another learning rate, or another initialisation. Absent with aggregation="promql".',
            whole("layer_update_ratio", _LAYER, by="layer"),
            scheme="BuGn",
            size=_LAYERS,
        ),
        graph(
            505,
            "Optimizer memory by key and type",
            "Exact bytes of the optimizer's state on the chosen ranks, stacked; dashed what it was forecast to be "
            "before the first step. Good: flat after the first step, at the dashed line. AdamW in float32 holds 8 "
            "bytes a parameter.",
            Query(
                f"sum by (optimizer, key, dtype) (optwatch_optimizer_state_bytes{{{SELECTED}}})",
                "{{optimizer}} {{key}} {{dtype}}",
            ),
            Query(
                f"sum by (optimizer) (optwatch_optimizer_state_forecast_bytes{{{SELECTED}}})", "{{optimizer}} forecast"
            ),
            unit="bytes",
            colour=MOMENT,
            size=_LAYERS,
            stacked=True,
            beside="forecast$",
            tones=((r"exp_avg_sq|square_avg|state2", 2), (r"max_exp|row|col", 3), (r"exp_avg |momentum|state1", 0)),
            minimum=0,
            no_value="The optimizer holds no state",
        ),
        rows(
            506,
            "First non-finite value of the present incident",
            "Good: none. The layer of the lowest step is where to look first; a loss has no layer.",
            Query(f"min by (source, layer, rank) (optwatch_nonfinite_first_step{{{RUN}}})"),
            columns={
                "Value": Column("Step", 110, unit="locale"),
                "source": Column("Where", 110),
                "layer": Column("Layer"),
                "rank": Column("Rank", 70),
            },
            size=_TABLE,
            no_value="No NaN and no Inf",
        ),
        rows(
            508,
            "Findings of the configuration's audit",
            "Good: none, or those that are meant. Each rule is explained in docs/audit.md; the log says which tensors "
            "it is about. Settings(audit_silenced=...) silences what is meant.",
            Query(f"max by (rule) (optwatch_audit_findings{{{RUN}}})"),
            columns={
                "rule": Column("Rule", links=(("Runbook", RUNBOOKS + "/TrainingAuditFinding"),)),
                "Value": Column("Findings", 110, unit="locale"),
            },
            size=_TABLE,
            no_value="The audit found nothing",
        ),
    ]
