"""Jumps of a signal: at their limit, over noise of each kind, and over what real curves do."""

from __future__ import annotations

import json
import math
import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optwatch.detectors import SpikeDetector, Surprise
from optwatch.detectors.spike import NEW_LEVEL, RECENT
from optwatch.detectors.window import SortedWindow

WINDOW, RARITY, WARMUP = 20, 1750.0, 30


def detector(rarity: float = RARITY, least: float = 0.05, warmup: int = WARMUP) -> SpikeDetector:
    return SpikeDetector(WINDOW, rarity, least, warmup)


def spikes(found: SpikeDetector, values: list[float], start: int = 0) -> list[int]:
    return [step for step, value in enumerate(values, start) if found.observe(step, value)]


def noise(count: int, level: float = 2.0, spread: float = 0.02, seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [level * math.exp(source.gauss(0, spread)) for _ in range(count)]


def outliers(count: int, every: int, seed: int = 1) -> list[float]:
    """Noise of which one value in about `every` is an outlier of the data, of eight to twelve of its deviations."""
    source = random.Random(seed)
    return [
        value * (math.exp(0.02 * source.uniform(8, 12)) if source.random() < 1 / every else 1)
        for value in noise(count, seed=seed)
    ]


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=80), st.integers(1, 60))
def test_a_window_gives_the_order_statistics_of_its_last_numbers(values: list[float], size: int) -> None:
    window = SortedWindow(size)
    for value in values:
        window.add(value)
    kept = values[-size:]
    assert window.values() == kept
    assert window.median() == median(kept)
    center = window.median()
    upper = sorted(abs(value - center) for value in kept)[len(kept) // 2]
    assert window.deviation(center) == pytest.approx(1.4826 * upper)
    assert window.largest(1) == [max(kept)]


def test_surprise_of_noise_is_the_logarithm_of_how_rare_it_is() -> None:
    source, surprise = random.Random(5), Surprise()
    judged = []
    for n in range(6000):
        error = source.gauss(0, 0.02)
        score, found = surprise.judge(error, 1.0)
        surprise.learn(error, score if n > 100 else None)
        judged.append(found)
    late = judged[2000:]
    for odds in (20, 100):
        share = sum(found > math.log(odds) for found in late) / len(late)
        assert 0.5 / odds < share < 2 / odds, odds


def test_ten_deviations_are_a_spike_in_normal_noise_and_three_are_none() -> None:
    curve = noise(400)
    assert spikes(detector(), [*curve, 2 * math.exp(0.03 * 2)]) == []
    assert spikes(detector(), [*curve, 2 * math.exp(0.02 * 10)]) == [400]


def test_the_same_ten_deviations_are_none_where_the_data_has_such_outliers_all_the_time() -> None:
    curve = outliers(1500, every=40)
    found = detector()
    early = spikes(found, curve)
    assert len(early) <= 5
    assert spikes(found, [2 * math.exp(0.02 * 10)], start=1500) == []
    # What is far beyond those outliers is a spike all the same.
    assert spikes(found, [40.0], start=1501) == [1501]


def test_how_rare_a_spike_has_to_be_is_a_setting() -> None:
    curve = [*noise(400), 2 * math.exp(0.02 * 7)]
    assert spikes(detector(rarity=100), curve)[-1:] == [400]
    assert 400 not in spikes(detector(rarity=1e9), curve)


def test_on_a_curve_without_noise_the_least_increase_is_the_limit() -> None:
    assert spikes(detector(), [*[2.0] * 150, 2.0 * 1.0499]) == []
    assert spikes(detector(), [*[2.0] * 150, 2.0 * 1.0501]) == [150]


def test_there_are_no_spikes_before_the_warm_up_is_over() -> None:
    assert spikes(detector(), [*[2.0] * (WARMUP - 1), 100.0]) == []
    assert spikes(detector(), [*[2.0] * WARMUP, 100.0]) == [WARMUP]


def test_a_fall_is_no_spike() -> None:
    assert spikes(detector(), [*noise(60), 0.001]) == []


def test_a_return_to_where_the_signal_has_just_been_is_no_spike() -> None:
    fast_fall = [*[6.9] * 60, *noise(30, level=4.5)]
    assert len(fast_fall) - 60 < RECENT
    assert spikes(detector(), [*fast_fall, 6.5]) == []
    assert spikes(detector(), [*fast_fall, 7.5]) == [90]


def test_an_episode_is_counted_once_and_the_next_one_again() -> None:
    curve = [*noise(60), *[50.0] * 10, *noise(60, seed=2), *[50.0] * 3, *noise(20, seed=3)]
    assert spikes(detector(), curve) == [60, 130]


def test_values_that_are_too_high_together_are_a_spike_though_none_is_by_itself() -> None:
    high = [2 * math.exp(0.02 * 3.5)] * 12
    found = detector()
    assert spikes(found, noise(400)) == []
    lasting = [spike for step, value in enumerate(high) if (spike := found.observe(400 + step, value))]
    assert [spike.lasting for spike in lasting] == [True]
    # One of them alone, again and again, is none.
    alone = [value for _ in range(30) for value in (high[0], *noise(20, seed=7))]
    assert spikes(detector(), [*noise(400), *alone]) == []


def test_a_level_that_stays_is_one_spike_and_then_the_new_band() -> None:
    curve = [*noise(100), *noise(NEW_LEVEL + 100, level=20.0, seed=2)]
    assert spikes(detector(), curve) == [100]
    # It is the band now: what is far above it is a spike again.
    assert spikes(detector(), [*curve, 400.0]) == [100, len(curve)]


def test_a_spike_does_not_blind_to_the_one_right_after_it() -> None:
    curve = [*noise(300), *[20.0] * 8, *noise(5, seed=2), *[20.0] * 8]
    assert spikes(detector(), curve) == [300, 313]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_neither_fires_nor_blinds(bad: float) -> None:
    found = detector()
    assert spikes(found, [*noise(60), bad, *[bad] * 20]) == []
    assert spikes(found, [50.0], start=90) == [90]


def test_a_signal_that_crosses_zero_is_judged_by_its_values() -> None:
    source = random.Random(4)
    curve = [source.gauss(0, 0.1) for _ in range(200)]
    assert spikes(detector(), [*curve, 0.25]) == []
    assert spikes(detector(), [*curve, 3.0]) == [200]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300))
def test_no_signal_makes_it_raise(values: list[float]) -> None:
    spikes(detector(warmup=0), values)


def test_a_signal_that_stands_at_zero_has_no_noise_to_be_judged_by_and_later_its_own() -> None:
    """As the gradient norm of a model whose units are all dead, and of one that is trained on."""
    found = detector()
    assert spikes(found, [0.0] * 300 + [5.0] + [0.0] * 300) == []
    curve = noise(400)
    assert spikes(found, [*curve, 10 * curve[-1]]) == [400]


def test_a_detector_that_goes_on_from_a_state_judges_as_if_it_had_never_stopped() -> None:
    curve = [*outliers(700, every=50), *[30.0] * 5, *noise(200, seed=3), 2.6, *noise(80, seed=4), 30.0]
    whole = detector()
    expected = spikes(whole, curve)
    for stop in (10, 400, 702):  # in the warm-up, in the band, within an episode
        first, second = detector(), detector()
        before = spikes(first, curve[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = spikes(second, curve[stop:], start=stop)
        assert before + after == expected, stop


def test_its_state_is_bounded() -> None:
    found = detector()
    sizes = []
    for count in (3000, 3000):
        spikes(found, noise(count))
        sizes.append(len(json.dumps(found.state_dict())))
    assert sizes[1] < 1.02 * sizes[0]
    assert sizes[1] < 60_000
