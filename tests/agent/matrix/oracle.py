"""What a step of a cell is to export: from whole tensors, in float64, by each statistic's definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import ways
from subjects import Training
from torch import Tensor


def norm(tensors: Any) -> float:
    """Over all entries of all tensors."""
    return math.sqrt(ways.square_sum(tensors))


class Oracle:
    """Collects one step. `before_clip`, `before`, `after` are called at those moments, on every rank alike."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.want: dict[str, float] = {}
        self.skipped = False

    def by_layer(self, tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
        """Of every layer, a frozen one included: it has none, whose norm is 0 and whose mean is no number."""
        return {ways.layer_of(name): [] for name in self.training.named} | ways.by_layer(tensors)

    def tensors(self, read: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        """Whole, by name. The state of ZeRO-1 is on one rank alone."""
        mine = {name: ways.whole(read(p)) for name, p in self.training.named.items()}
        if self.training.cell.way == "ZeRO-1":
            mine = ways.gathered(mine)
        return {name: x for name, x in mine.items() if x is not None}

    def state(self, key: str) -> dict[str, Tensor]:
        """Of each parameter that has it."""
        state = self.training.state

        def read(p: Tensor) -> Tensor | None:
            value = state.get(p, {}).get(key)
            return value if isinstance(value, Tensor) and value.numel() else None

        return self.tensors(read)

    def gradients(self, scaled: bool) -> dict[str, Tensor]:
        """Without the scaler's scale."""
        scaler = self.training.scaler
        scale = scaler.get_scale() if scaler is not None and scaled else 1.0
        return {name: g / scale for name, g in self.tensors(lambda p: p.grad).items()}

    def before_clip(self) -> None:
        """Between unscaling and clipping."""
        gradients = self.gradients(scaled=False)
        self.want['optwatch_grad_norm{stage="before_clip"}'] = norm(gradients.values())

    def before(self, unscaled: bool) -> None:
        """Just before the step. ``unscaled``: whether gradients are without the scale already."""
        gradients = self.gradients(scaled=not unscaled)
        self.skipped = not all(g.isfinite().all() for g in gradients.values())
        self.want['optwatch_grad_norm{stage="at_step"}'] = norm(gradients.values())
        for layer, tensors in self.by_layer(gradients).items():
            self.want[f'optwatch_layer_grad_norm{{layer="{layer}"}}'] = norm(tensors)
        first = self.training.kind.first
        moments = self.state(first) if first else {}
        lengths = norm(gradients[n] for n in moments) * norm(moments.values())
        if lengths:
            dot = sum((gradients[name] * m).sum().item() for name, m in moments.items())
            self.want["optwatch_grad_moment_cosine"] = dot / lengths
        self.weights = self.tensors(lambda p: p)

    def after(self) -> None:
        """Just behind the step."""
        weights, kind = self.tensors(lambda p: p), self.training.kind
        moved = {name: weights[name] - self.weights[name] for name in weights}
        (group,) = self.training.optimizer.param_groups
        self.want['optwatch_learning_rate{group="0"}'] = float(group.get("scheduled_lr", group["lr"]))
        if self.training.scaler is not None:
            still = not any(x.any() for x in moved.values())
            assert still == self.skipped or kind.rotated, "the scaler has skipped another step than the one it should"
        if self.skipped:
            return
        self.want["optwatch_weight_norm"] = norm(weights.values())
        self.want["optwatch_update_norm"] = norm(moved.values())
        self.want["optwatch_update_ratio"] = norm(moved.values()) / norm(weights.values())
        by_layer = ways.by_layer(moved)
        for layer, tensors in ways.by_layer(weights).items():
            self.want[f'optwatch_layer_weight_norm{{layer="{layer}"}}'] = norm(tensors)
            if norm(tensors):
                self.want[f'optwatch_layer_update_ratio{{layer="{layer}"}}'] = norm(by_layer[layer]) / norm(tensors)
        if kind.first:
            firsts = self.state(kind.first)
            self.want["optwatch_first_moment_norm"] = norm(firsts.values())
            for layer, tensors in self.by_layer(firsts).items():
                self.want[f'optwatch_layer_first_moment_norm{{layer="{layer}"}}'] = norm(tensors)
        if seconds := self.seconds():
            self.second(seconds)

    def seconds(self) -> dict[str, Tensor]:
        """The second moment of each parameter that has one; of a sharded matrix no factored one is available."""
        keys = self.training.kind.second
        if len(keys) < 2:
            return self.state(keys[0]) if keys else {}
        plain, rows, columns = self.state("variance"), self.state(keys[0]), self.state(keys[1])
        cut = {name for name, p in self.training.named.items() if hasattr(p, "placements")}
        factored = {
            # v = r·c / mean(r), Shazeer & Stern 2018, algorithm 2
            name: r @ columns[name] / r.mean(-2, keepdim=True)
            for name, r in rows.items()
            if name not in cut
        }
        return plain | factored

    def second(self, seconds: dict[str, Tensor]) -> None:
        """Everything that is of second moments."""
        kind, want = self.training.kind, self.want
        count = sum(v.numel() for v in seconds.values())
        want["optwatch_second_moment_mean"] = sum(v.sum().item() for v in seconds.values()) / count
        want["optwatch_second_moment_max"] = max(v.max().item() for v in seconds.values())
        for layer, tensors in self.by_layer(seconds).items():
            entries = sum(v.numel() for v in tensors)
            mean = sum(v.sum().item() for v in tensors) / entries if entries else math.nan
            want[f'optwatch_layer_second_moment_mean{{layer="{layer}"}}'] = mean
        if not kind.adaptive:
            return
        (group,) = self.training.optimizer.param_groups
        taken = self.want["optwatch_steps_total"]
        correction, epsilon = 1 - group["betas"][1] ** taken, group["eps"]
        corrected = {name: v / correction for name, v in seconds.items()}
        below = sum((v.sqrt() < epsilon).sum().item() for v in corrected.values())
        want["optwatch_epsilon_dominated_ratio"] = below / count
        rate = float(group.get("scheduled_lr", group["lr"]))
        effective = []
        for tensors in ways.by_layer(corrected).values():
            mean = sum(v.sum().item() for v in tensors) / sum(v.numel() for v in tensors)
            effective.append(rate / (math.sqrt(mean) + epsilon))
        for quantile in (0.1, 0.5, 0.9):
            value = torch.quantile(torch.tensor(effective, dtype=torch.float64), quantile).item()
            want[f'optwatch_effective_learning_rate{{quantile="{quantile}"}}'] = value
