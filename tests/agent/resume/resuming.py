"""A small training that is saved and resumed as real scripts do it, for the tests of the resume audit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 6


class Masters(torch.optim.SGD):
    """SGD with momentum in float32 on float32 copies of 16-bit weights, as mixed-precision optimizers keep them."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["master"], state["momentum"] = p.float(), torch.zeros_like(p, dtype=torch.float32)
                state["momentum"].mul_(0.9).add_(p.grad.float())
                p.copy_(state["master"].sub_(group["lr"] * state["momentum"]))

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)  # casts to the parameters' dtype
        for i, p in enumerate(self.param_groups[0]["params"]):
            self.state[p] = {key: value.clone() for key, value in saved["state"][i].items()}


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Decay for matrices, none for the rest: two groups."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=0.01, **options)


class Training:
    """A model, its optimizer and scheduler; `optimizer` and `scheduler` make them."""

    def __init__(
        self,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        layers = [nn.Linear(6, 6), nn.LayerNorm(6), nn.Dropout(0.1), nn.Linear(6, 6), nn.Linear(6, 1)]
        self.model = nn.Sequential(*layers).to(dtype)
        self.dtype = dtype
        self.optimizer = optimizer(self.model)
        self.scheduler = scheduler(self.optimizer) if scheduler else None

    def train(self, steps: int = STEPS) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = (self.model(torch.randn(16, 6, dtype=self.dtype)) - 1).square().mean()
            loss.backward()
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
        }
        return saved | ({"scheduler": self.scheduler.state_dict()} if self.scheduler else {})

    def save(self, monitor: Any, path: Path) -> None:
        with monitor.checkpoint(path):
            torch.save(self.state(), path)

    def load(self, saved: Mapping[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        torch.set_rng_state(saved["generator"])


class Told:
    """A sink that keeps every event."""

    def __init__(self, monitor: Any) -> None:
        self.events: list[Any] = []
        self._monitor = monitor
        monitor.sinks.append(self)

    def record(self, record: Any) -> None:
        """Steps are not asked for."""

    def event(self, event: Any) -> None:
        self.events.append(event)

    def faults(self) -> dict[str, Any]:
        """Events of the resume audit by fault, once everything so far has been handled."""
        assert self._monitor.flush(60)
        assert self._monitor.faults.counts == {}
        found = {event.details["fault"]: event for event in self.events if event.details.get("audit") == "resume"}
        assert len(found) == len([event for event in self.events if "fault" in event.details])
        return found


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Break a checkpoint where it is: read it, change it, write it again."""
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def flip_a_bit(path: Path, tensor: Tensor) -> None:
    """Flip one bit of this tensor's bytes in the file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    wanted = tensor.contiguous().numpy().tobytes()
    assert content.count(wanted) == 1
    content[content.index(wanted) + 2] ^= 0x10
    path.write_bytes(bytes(content))
