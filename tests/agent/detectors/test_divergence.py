"""A spike that does not come back is a divergence; one that does is not."""

from __future__ import annotations

import math
import random
from itertools import chain

import pytest

from optwatch.detectors import Divergence, DivergenceDetector, SpikeDetector

PATIENCE = 100


def found(losses: list[float]) -> list[tuple[int, Divergence]]:
    spikes = SpikeDetector(window=20, rarity=2000, min_increase=0.05, warmup=30)
    detector = DivergenceDetector(PATIENCE)
    result = []
    for step, loss in enumerate(losses):
        if spike := spikes.observe(step, loss):
            detector.begin(step, spike.level, spike.limit)
        if divergence := detector.observe(step, loss):
            result.append((step, divergence))
    return result


def noisy(level: float, count: int, seed: int = 0) -> list[float]:
    noise = random.Random(seed)
    return [level * (1 + 0.01 * noise.uniform(-1, 1)) for _ in range(count)]


def test_a_loss_that_jumps_and_stays_has_diverged_after_the_patience_once() -> None:
    got = found([*noisy(2.0, 100), *noisy(6.0, 300, seed=1)])
    assert [step for step, _ in got] == [100 + PATIENCE]
    assert got[0][1].began == 100
    assert got[0][1].before == pytest.approx(2.0, rel=0.02)
    assert got[0][1].now == pytest.approx(6.0, rel=0.02)


@pytest.mark.parametrize("after", [10, PATIENCE - 25])
def test_a_spike_that_comes_back_before_the_patience_is_none(after: int) -> None:
    assert found([*noisy(2.0, 100), *noisy(6.0, after, seed=1), *noisy(2.0, 300, seed=2)]) == []


def test_a_single_good_batch_is_no_recovery() -> None:
    high = noisy(6.0, 300, seed=1)
    high[30] = high[60] = 2.0
    assert len(found([*noisy(2.0, 100), *high])) == 1


def test_nan_in_between_neither_hides_it_nor_counts_as_one() -> None:
    high = noisy(6.0, 300, seed=1)
    high[40] = high[41] = math.nan
    assert len(found([*noisy(2.0, 100), *high])) == 1
    assert found([*noisy(2.0, 100), *[math.nan] * 300]) == []


def test_a_falling_curve_with_short_spikes_never_diverges() -> None:
    losses = [4 * math.exp(-step / 400) + 1 + 0.01 * random.Random(step).uniform(-1, 1) for step in range(1500)]
    for step in chain(range(300, 305), range(900, 920)):
        losses[step] *= 3
    assert found(losses) == []
