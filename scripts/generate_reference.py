"""Write docs/metrics.md, the metric reference, from the catalogues: ``python scripts/generate_reference.py [FILE]``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from optwatch.catalogue import COMMON_LABELS, METRICS, Metric

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "The run",
        (
            "optwatch_run_info",
            "optwatch_step",
            "optwatch_last_step",
            "optwatch_accumulation",
            "optwatch_tokens",
            "optwatch_target",
        ),
    ),
    ("Loss and reported values", ("optwatch_loss", "optwatch_reported")),
    ("Gradients and weights", ("optwatch_grad_norm", "optwatch_weight_norm", "optwatch_update")),
    ("Rates", ("optwatch_learning_rate", "optwatch_weight_decay", "optwatch_effective")),
    (
        "Optimizer state",
        (
            "optwatch_first_moment",
            "optwatch_second_moment",
            "optwatch_epsilon",
            "optwatch_grad_moment",
            "optwatch_optimizer_state",
        ),
    ),
    ("Layers", ("optwatch_layer_",)),
    ("Sums over a rank's part", ("optwatch_shard_", "optwatch_layer_shard_")),
    (
        "What happened",
        ("optwatch_nonfinite", "optwatch_spikes", "optwatch_skipped", "optwatch_events", "optwatch_audit"),
    ),
    ("Devices and checkpoints", ("optwatch_device", "optwatch_checkpoint", "optwatch_last_checkpoint")),
    ("The agent itself", ("optwatch_agent_",)),
)
"""Headings and the beginnings of the names under them; a metric belongs to the longest beginning that fits."""

SERVER_GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The server's health", ("optwatch_server_",)),
    ("The fleet", ("optwatch_fleet_",)),
)

HEADER = """# Metrics

<!-- Written by scripts/generate_reference.py from the catalogues. Change those, and run it again. -->

Base units are in the names. A counter ends in `_total` and exists as 0 before the first step. "Cost" is what taking the
value costs a training step, and "when" is how often it is new: at every step, on sampled steps (in rotation over 10
steps, or up to 160 where these take less than about fifteen seconds, or `Settings.sample_every` steps), at a change, or
in the host's own time.
"""

AGENT = """
## The agent

Every sample carries {labels}, and `optimizer` where one run watches several.
"""

SERVER = """
## The server

Scraped from the server's `/metrics`, with the labels listed here and no others.
"""


def reference(agent: Sequence[Metric], server: Sequence[Any] = ()) -> str:
    """The page as Markdown: a table a group, metrics in the order of their catalogue.

    Args:
        agent: the agent's metrics.
        server: the server's, of a class with the same fields; the page has no such part when there are none.

    Raises:
        ValueError: a metric belongs to no group, and its name is told.
    """
    common = " and ".join(f"`{label}`" for label in COMMON_LABELS)
    parts = [HEADER, AGENT.format(labels=common), *_tables(agent, GROUPS)]
    if server:
        parts += [SERVER, *_tables(server, SERVER_GROUPS)]
    return "".join(parts)


def server_metrics() -> Sequence[Any]:
    """The server's catalogue, or nothing where its package or catalogue is not installed."""
    if find_spec("optwatch_server") is None or find_spec("optwatch_server.catalogue") is None:
        return ()
    metrics: Sequence[Any] = import_module("optwatch_server.catalogue").METRICS
    return metrics


def _tables(metrics: Sequence[Any], groups: tuple[tuple[str, tuple[str, ...]], ...]) -> list[str]:
    of_group: dict[str, list[Any]] = {title: [] for title, _ in groups}
    for metric in metrics:
        fitting = [(len(start), title) for title, starts in groups for start in starts if metric.name.startswith(start)]
        if not fitting:
            raise ValueError(f"{metric.name} belongs to no group: add the beginning of its name to GROUPS")
        of_group[max(fitting)[1]].append(metric)
    return [_table(title, members) for title, members in of_group.items() if members]


def _table(title: str, metrics: Sequence[Any]) -> str:
    lines = ["", f"### {title}", "", "| metric | kind | unit | labels | when | what it is | cost |", "| --- " * 7 + "|"]
    for metric in metrics:
        cells = (
            f"`{metric.name}`",
            metric.kind,
            "" if metric.unit == "1" else metric.unit,
            "<br>".join(_label(metric, index) for index in range(len(metric.labels))),
            metric.cadence,
            metric.help,
            metric.cost,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _label(metric: Any, index: int) -> str:
    values = metric.values[index] if index < len(metric.values) else ()
    name = f"`{metric.labels[index]}`"
    return f"{name}: {', '.join(values)}" if values else name


def main(arguments: list[str]) -> int:
    """Write to the file named by the only argument, or to docs/metrics.md."""
    path = Path(arguments[0]) if arguments else DOCUMENT
    path.write_text(reference(METRICS, server_metrics()), encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
