"""The debug dashboard: one run, or several compared, from "is it fine" down to "why"."""

from __future__ import annotations

from dashboards import checkpoints, inside, operation, signals, verdict
from dashboards.page import page
from grafana_foundation_sdk.builders import dashboard


def debug() -> dashboard.Dashboard:
    """Build `optwatch-debug`. A row's id is a multiple of 100, and its panels count on from it."""
    built = page(
        "optwatch-debug",
        "optwatch: debug",
        "One training run, or several compared. Rows lead from 'is it fine' to 'why'. Series are named by their run, "
        "and those of one rank run/rank.",
    )
    for row, panels in (
        (dashboard.Row("Is it fine?").id(100), verdict.panels()),
        (dashboard.Row("Loss and gradients").id(200), signals.loss_and_gradients()),
        (dashboard.Row("Rates and updates").id(300), signals.rates()),
        (dashboard.Row("Optimizer state").id(400), signals.moments()),
        (dashboard.Row("Layers and memory of ${run_id}").id(500).repeat("run_id"), inside.inside_one_run()),
        (dashboard.Row("What happened").id(600), operation.events()),
        (dashboard.Row("Checkpoints and target").id(900), checkpoints.panels()),
        (dashboard.Row("Speed and device").id(700), [*operation.speed(), *operation.device()]),
        (dashboard.Row("The agent itself").id(800), operation.agent()),
    ):
        built.with_row(row)
        for panel in panels:
            built.with_panel(panel)
    return built
