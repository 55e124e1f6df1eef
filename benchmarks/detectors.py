"""How well the agent's detectors tell trouble from noise, beside the rules that others use, on the same curves.

    python benchmarks/detectors.py [--curves ../shared/curves] [--write]

Real curves are labelled (`labels.json` in their folder, which this repository does not carry) and scored strictly: an
alert on the loss counts as found inside an interval that has to be found, and as false outside of all intervals; on
smooth curves and hard negatives only intervals that have to be found excuse one. Synthetic curves are generated, with
fixed seeds. Leaving one source out, window and rarity are chosen on the curves of the other sources.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

from optwatch import Settings
from optwatch.detectors import replay
from optwatch.detectors.recorded import signal

RESULTS = Path(__file__).with_name("results") / "detectors.md"
CURVES = Path(__file__).parents[2] / "shared" / "curves"
WARMUP = 30
Curve = list[tuple[int, float, float | None]]
Rule = Callable[[Curve], list[int]]
WINDOWS, RARITIES = (15, 18, 20, 22, 25), (1250.0, 1500.0, 1750.0, 2000.0, 2500.0)
SEEDS = 40


def ours(settings: Settings) -> Rule:
    return lambda curve: [event.step for event in replay(curve, settings) if signal(event) == "loss"]


def windowed(size: int, alert: Callable[[float, list[float]], bool]) -> Rule:
    """A rule over the last `size` losses; an episode counts once."""

    def rule(curve: Curve) -> list[int]:
        window: deque[float] = deque(maxlen=size)
        steps, inside = [], False
        for number, (step, loss, _) in enumerate(curve):
            high = number >= WARMUP and len(window) > 7 and alert(loss, list(window))
            if high and not inside:
                steps.append(step)
            inside = high
            window.append(loss)
        return steps

    return rule


def z_score(loss: float, window: list[float]) -> float:
    """Blind, as such rules are, while anything in the window is not finite."""
    mean = sum(window) / len(window)
    variance = sum((value - mean) ** 2 for value in window) / len(window)
    return (loss - mean) / math.sqrt(variance) if 0 < variance < math.inf else 0.0


def mad_score(loss: float, window: list[float]) -> float:
    finite = [math.log(value) for value in window if 0 < value < math.inf]
    if len(finite) < 8 or not 0 < loss < math.inf:
        return 0.0
    middle = median(finite)
    return (math.log(loss) - middle) / max(1.4826 * median(abs(value - middle) for value in finite), 1e-6)


def ten_times_least(curve: Curve) -> list[int]:
    least, steps, inside = math.inf, [], False
    for step, loss, _ in curve:
        high = loss > 10 * least
        if high and not inside:
            steps.append(step)
        inside = high
        least = min(least, loss)
    return steps


def cusum(curve: Curve) -> list[int]:
    """Page's test on the difference to an exponential mean, in its exponential deviations: drift 0.5, limit 5."""
    mean, variance, total, steps = 0.0, 0.0, 0.0, []
    for number, (step, loss, _) in enumerate(curve):
        if number == 0:
            mean = loss
        score = (loss - mean) / math.sqrt(variance) if variance > 0 else 0.0
        total = max(0.0, total + score - 0.5)
        if number >= WARMUP and total > 5:
            steps.append(step)
            total = 0.0
        variance += 0.02 * ((loss - mean) ** 2 - variance)
        mean += 0.02 * (loss - mean)
    return steps


RULES: dict[str, Rule] = {
    "optwatch": ours(Settings()),
    "median/MAD of 50 > 10, and 5 %": windowed(50, lambda x, w: mad_score(x, w) > 10 and x > 1.05 * median(w)),
    "median/MAD of 50 > 6": windowed(50, lambda x, w: mad_score(x, w) > 6),
    "z-score of 128 > 6": windowed(128, lambda x, w: z_score(x, w) > 6),
    "z-score of 50 > 5": windowed(50, lambda x, w: z_score(x, w) > 5),
    "2 × mean of 100": windowed(100, lambda x, w: x > 2 * fmean(w)),
    "10 × least so far": ten_times_least,
    "CUSUM (0.5, 5)": cusum,
}


def read(path: Path) -> Curve:
    with path.open(newline="") as file:
        return [
            (int(row["step"]), float(row["loss"]), float(row["grad_norm"]) if row.get("grad_norm") else None)
            for row in csv.DictReader(file)
        ]


def within(step: int, intervals: Iterable[dict[str, Any]]) -> bool:
    return any(interval["start_step"] <= step <= interval["end_step"] for interval in intervals)


def score(label: dict[str, Any], alerts: list[int]) -> tuple[int, int, int]:
    """Intervals that had to be found, those that were, and false alerts."""
    must = [interval for interval in label["spikes"] if interval["must"]]
    strict = label["category"] in ("smooth", "hard_negative")
    excused = must if strict else label["spikes"]
    found = sum(any(within(step, [interval]) for step in alerts) for interval in must)
    return len(must), found, sum(not within(step, excused) for step in alerts)


def real(labels: list[dict[str, Any]], curves: dict[str, Curve], rule: Rule) -> dict[str, tuple[int, int, int]]:
    """Scores by file."""
    return {label["file"]: score(label, rule(curves[label["file"]])) for label in labels}


def totals(labels: list[dict[str, Any]], scores: dict[str, tuple[int, int, int]]) -> tuple[int, int, int, int, int]:
    """Had to be found, found, false on smooth curves, on hard negatives, on others."""
    chosen = [label for label in labels if label["file"] in scores]
    false = {"smooth": 0, "hard_negative": 0, "other": 0}
    for label in chosen:
        false[label["category"] if label["category"] in false else "other"] += scores[label["file"]][2]
    must, found = (sum(scores[label["file"]][i] for label in chosen) for i in (0, 1))
    return must, found, false["smooth"], false["hard_negative"], false["other"]


def noise(seed: int, count: int, spread: float, heavy: bool = False) -> list[float]:
    """A falling loss with normal noise, or with Student's t of 3 degrees of freedom."""
    source = random.Random(seed)

    def one() -> float:
        if not heavy:
            return source.gauss(0, spread)
        return spread * source.gauss(0, 1) / math.sqrt(sum(source.gauss(0, 1) ** 2 for _ in range(3)) / 3)

    return [2 + 3 * math.exp(-step / 300) + one() for step in range(count)]


def synthetic(rule: Rule) -> dict[str, str]:
    """Jumps and ramps found, and false alerts in 10k steps, each over `SEEDS` curves."""
    spread, at = 0.05, 1000

    def alerts(losses: list[float]) -> list[int]:
        return rule([(step, loss, None) for step, loss in enumerate(losses)])

    row = {}
    for name, steps in (("jump of 10 σ, 1 step", 1), ("jump of 10 σ, 20 steps", 20)):
        hits = 0
        for seed in range(SEEDS):
            losses = noise(seed, 1200, spread)
            for step in range(at, at + steps):
                losses[step] += 10 * spread
            hits += any(at <= step < at + steps for step in alerts(losses))
        row[name] = f"{hits / SEEDS:.0%}"
    for length in (100, 300, 1000):
        delays = []
        for seed in range(SEEDS // 4):
            losses = noise(seed, 1600, spread)
            for step in range(at, len(losses)):
                losses[step] += min(2.0, 2.0 * (step - at) / length)
            delays.append(min((step - at for step in alerts(losses) if step >= at), default=math.inf))
        row[f"ramp of 2 over {length}, slowest of {SEEDS // 4}"] = (
            f"{max(delays)} steps" if max(delays) < math.inf else f"missed {sum(map(math.isinf, delays))}"
        )
    for name, heavy in (("normal noise", False), ("Student's t(3) noise", True)):
        false = sum(len(alerts(noise(1000 + seed, 5000, spread, heavy))) for seed in range(10))
        row[f"false alerts in 10k, {name}"] = f"{false / 5:.1f}"
    losses = noise(1, 1200, spread)
    losses[at - 5], losses[at] = math.nan, losses[at] + 2
    row["jump of 40 σ, 5 steps after a NaN"] = "found" if at in alerts(losses) else "missed"
    return row


def left_out(labels: list[dict[str, Any]], curves: dict[str, Curve], sources: dict[str, str]) -> Iterator[list[str]]:
    """For each source: what the others choose, and what it then does on the curves of that source."""
    grid = {
        (window, rarity): real(labels, curves, ours(Settings(spike_window=window, spike_rarity=rarity)))
        for window, rarity in itertools.product(WINDOWS, RARITIES)
    }

    def cost(choice: tuple[int, float], chosen: list[dict[str, Any]]) -> tuple[int, float]:
        must, found, smooth, hard, other = totals(chosen, grid[choice])
        return must - found + smooth + hard + other, abs(math.log(choice[1] / Settings().spike_rarity))

    for source in sorted(set(sources.values())):
        inside = [label for label in labels if sources[label["file"]] == source]
        others = [label for label in labels if sources[label["file"]] != source]
        best = min(grid, key=lambda choice: cost(choice, others))
        must, found, smooth, hard, other = totals(inside, grid[best])
        points = sum(len(curves[label["file"]]) for label in inside)
        yield [
            source,
            f"{best[0]}, {best[1]:.0f}",
            f"{points}",
            f"{found} of {must}",
            f"{smooth}",
            f"{hard}",
            f"{other}",
        ]
    yield []
    yield ["window \\ rarity", *(f"{rarity:.0f}" for rarity in RARITIES)]
    for window in WINDOWS:
        cells = [totals(labels, grid[window, rarity]) for rarity in RARITIES]
        yield [f"{window}", *(f"{found}/{must}, {smooth}, {hard}" for must, found, smooth, hard, _ in cells)]


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def source_of(folder: Path) -> dict[str, str]:
    """The repository that each file comes from, by the table in the folder's README."""
    rows = (line.split("|") for line in (folder / "README.md").read_text().splitlines() if ".csv |" in line)
    return {row[1].strip(): row[4].strip() for row in rows}


def report(folder: Path) -> str:
    made = [["rule"]]
    for name, rule in RULES.items():
        row = synthetic(rule)
        made[0][1:] = row
        made.append([name, *row.values()])
    flipped = [list(row) for row in zip(*made, strict=True)]
    parts = ["## Synthetic curves", table(flipped)]
    if not (folder / "labels.json").is_file():
        return "\n\n".join([*parts, "The labelled curves were not there."])
    labels = json.loads((folder / "labels.json").read_text())
    curves = {label["file"]: read(folder / label["file"]) for label in labels}
    points = {
        kind: sum(len(curves[label["file"]]) for label in labels if label["category"] == kind)
        for kind in ("smooth", "hard_negative")
    }
    rows = [
        ["rule", "had to be found", "found", "false, smooth", "in 10k", "false, hard negatives", "in 10k", "elsewhere"]
    ]
    for name, rule in RULES.items():
        must, found, smooth, hard, other = totals(labels, real(labels, curves, rule))
        per = [10_000 * smooth / points["smooth"], 10_000 * hard / points["hard_negative"]]
        rows.append([name, f"{must}", f"{found}", f"{smooth}", f"{per[0]:.1f}", f"{hard}", f"{per[1]:.1f}", f"{other}"])
    parts += [
        f"## Labelled real curves\n\n{len(labels)} curves, {sum(map(len, curves.values()))} points, {points['smooth']} "
        f"of them smooth and {points['hard_negative']} hard negatives.",
        table(rows),
    ]
    began = time.perf_counter()
    by_file = [
        ["file", "category", "found", "false", "kinds of event on the loss", "gradient spikes", "first NaN or Inf"]
    ]
    for label in labels:
        events = list(replay(curves[label["file"]]))
        on_loss = [event for event in events if signal(event) == "loss"]
        must, found, false = score(label, [event.step for event in on_loss])
        kinds = ", ".join(
            f"{kind} {sum(e.kind == kind for e in on_loss)}" for kind in sorted({e.kind for e in on_loss})
        )
        broken = [event.step for event in events if event.kind == "nonfinite"]
        first_broken = "" if not broken else f"{broken[0]} (is at {label['first_nonfinite_step']})"
        gradient = sum(event.kind == "grad_spike" for event in events)
        by_file.append(
            [label["file"], label["category"], f"{found}/{must}", f"{false}", kinds, f"{gradient}", first_broken]
        )
    cost = (time.perf_counter() - began) / sum(map(len, curves.values()))
    parts += [f"## optwatch by file\n\n{1e6 * cost:.0f} µs a step for all detectors.", table(by_file)]
    lines = list(left_out(labels, curves, source_of(folder)))
    cut = lines.index([])
    head = ["left out", "window, rarity by the others", "points", "found", "false, smooth", "false, hard", "elsewhere"]
    parts += [
        "## One source left out\n\nWindow and rarity are chosen on the others, by the fewest mistakes. The detectors' "
        "constants are not: they were set while looking at all of these curves.",
    ]
    parts += [table([head, *lines[:cut]])]
    parts += [
        "## Sensitivity\n\nFound, false on smooth curves, false on hard negatives, by window and rarity.",
        table(lines[cut + 1 :]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, default=CURVES, help="folder of the labelled curves")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    text = (
        "# Detectors\n\nMade by `python benchmarks/detectors.py --write`. One default setting for everything; peers "
        f"are re-implementations of their rules with a warm-up of {WARMUP} points.\n\n{report(options.curves)}\n"
    )
    print(text)
    if options.write:
        RESULTS.write_text(text)


if __name__ == "__main__":
    main()
