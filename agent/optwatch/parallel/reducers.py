"""Reductions over tensors on several devices: each device reduces its own, and the numbers meet on one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optwatch.training.statistics import Reducer


class DeviceReducers(Reducer):
    """A `Reducer` whose tensors may be on any of several devices. Results are on ``device``.

    Only results travel between devices: a few numbers a tensor, without waiting. Not for `Reducer.changes`.
    """

    def __init__(self, devices: Sequence[torch.device], compiled: bool = False) -> None:
        # On an accelerator: a copy from there to the host would have to be waited for, the other way it has not.
        device = next((device for device in devices if device.type != "cpu"), devices[0])
        super().__init__(device, compiled)
        self._each = {one: Reducer(one, compiled) for one in devices}

    def _square_sums(self, listed: Sequence[Tensor]) -> Tensor:
        return self._joined(listed, {d: r.square_sums(_of(d, listed)) for d, r in self._each.items()})

    def _dot_products(self, xs: list[Tensor], ys: list[Tensor]) -> Tensor:
        return self._joined(xs, {d: r.dot_products(_of(d, xs), _of(d, ys)) for d, r in self._each.items()})

    def _nonnegative(self, listed: Sequence[Tensor], thresholds: Tensor | None) -> Tensor:
        results = {}
        for device, reducer in self._each.items():
            mine = [i for i, x in enumerate(listed) if x.device == device]
            limits = torch.stack([thresholds[i] for i in mine]) if thresholds is not None and mine else None
            results[device] = reducer.nonnegative([listed[i] for i in mine], limits)
        return self._joined(listed, results)

    def _joined(self, tensors: Sequence[Tensor], results: dict[torch.device, Tensor]) -> Tensor:
        """The results of each device in the order of the tensors, along their last dimension."""
        each: dict[torch.device, Iterator[Tensor]] = {
            device: iter(result.to(self.device, self.dtype, non_blocking=True).unbind(-1))
            for device, result in results.items()
        }
        shape = next(iter(results.values())).shape[:-1]
        if not tensors:
            return torch.zeros(*shape, 0, dtype=self.dtype, device=self.device)
        return torch.stack([next(each[x.device]) for x in tensors], dim=-1)


def _of(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.device == device]
