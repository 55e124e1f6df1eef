"""Incidents of NaN and Inf: one event each, that names where it began."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optwatch.detectors import NonFiniteDetector
from optwatch.detectors.nonfinite import HISTORY, QUIET_STEPS
from optwatch.events import Event
from optwatch.record import NonFinite, StepRecord

NAN = float("nan")
PARAMETERS, LAYERS = ("a.w", "b.w", "c.w"), ("a", "b", "c")


def record(step: int, *nonfinite: NonFinite, **fields: object) -> StepRecord:
    return StepRecord(step, "SGD", 1.7e9 + step, nonfinite=list(nonfinite), learning_rates=[0.1], **fields)  # type: ignore[arg-type]


def gradient(*positions: int, value: str = "nan") -> NonFinite:
    where = [(PARAMETERS[i], LAYERS[i]) for i in positions]
    return NonFinite("gradient", value, tuple(p for p, _ in where), tuple(la for _, la in where))  # type: ignore[arg-type]


def observe(detector: NonFiniteDetector, *broken: bool, start: int = 1) -> list[int]:
    """The steps at which an event was raised."""
    events: list[Event] = []
    for step, bad in enumerate(broken, start):
        events += detector.observe(record(step, *([gradient(0)] if bad else [])))
    return [event.step for event in events]


def test_an_incident_is_one_event_however_long_it_lasts() -> None:
    assert observe(NonFiniteDetector(), *[True] * 50) == [1]


def test_a_nan_within_the_quiet_steps_is_the_same_incident_and_after_them_a_new_one() -> None:
    within = [True, *[False] * (QUIET_STEPS - 1), True]
    after = [True, *[False] * QUIET_STEPS, True]
    assert observe(NonFiniteDetector(), *within) == [1]
    assert observe(NonFiniteDetector(), *after) == [1, len(after)]


@given(st.lists(st.booleans(), max_size=120))
def test_an_event_begins_each_run_of_bad_steps_after_enough_good_ones(broken: list[bool]) -> None:
    expected, quiet = [], QUIET_STEPS
    for step, bad in enumerate(broken, 1):
        if bad and quiet >= QUIET_STEPS:
            expected.append(step)
        quiet = 0 if bad else quiet + 1
    assert observe(NonFiniteDetector(), *broken) == expected


def test_a_backward_pass_goes_from_the_last_layer_to_the_first() -> None:
    (event,) = NonFiniteDetector().observe(record(7, gradient(0, 1)))
    assert (event.details["layer"], event.details["parameter"], event.details["phase"]) == ("b", "b.w", "backward")
    assert event.details["tensors"] == 2
    assert event.summary == (
        "NaN in the gradient at step 7, first in layer b (b.w), 2 tensors in all; learning rate 0.1, "
        "there was no finite step before it."
    )


def test_a_forward_pass_goes_from_the_first_layer_to_the_last() -> None:
    (event,) = NonFiniteDetector().observe(record(7, NonFinite("loss", "inf"), gradient(1, 2), loss=float("inf")))
    assert (event.details["layer"], event.details["phase"], event.details["source"]) == ("b", "forward", "loss")
    assert event.summary.startswith("Inf in the loss at step 7, first in layer b (b.w)")


def test_moments_and_weights_that_break_alone_were_broken_by_the_optimizer() -> None:
    (event,) = NonFiniteDetector().observe(record(7, NonFinite("weight", "inf", ("c.w",), ("c",))))
    assert (event.details["layer"], event.details["phase"]) == ("c", "weights")


def test_a_loss_that_breaks_alone_names_the_layer_with_the_largest_gradient() -> None:
    broken = record(7, NonFinite("loss", "nan"), loss=NAN, layers=list(LAYERS), layer_grad_norm=[1.0, 9.0, 2.0])
    (event,) = NonFiniteDetector().observe(broken)
    assert (event.details["layer"], event.details["parameter"]) == ("b", "")
    assert "no tensor is bad yet, the largest gradient is in layer b" in event.summary


def test_it_carries_the_last_finite_gradient_norms_before_clipping_and_no_more() -> None:
    detector = NonFiniteDetector()
    for step in range(1, HISTORY + 4):
        detector.observe(record(step, grad_norm=0.5, grad_norm_before_clip=float(step)))
    (event,) = detector.observe(record(99, gradient(0), grad_norm=NAN))
    assert event.details["grad_norms_before"] == [4.0, 5.0, 6.0, 7.0, 8.0]
    assert event.summary.endswith("gradient norms before: 4, 5, 6, 7, 8.")


def test_it_remembers_where_each_source_was_met_first_until_the_next_incident() -> None:
    detector = NonFiniteDetector()
    detector.observe(record(3, gradient(0)))
    detector.observe(record(4, gradient(1), NonFinite("weight", "nan", ("c.w",), ("c",))))
    assert {source: step for source, (step, _) in detector.first_steps.items()} == {"gradient": 3, "weight": 4}
    assert detector.first_steps["gradient"] == (3, "a")
    observe(detector, *[False] * QUIET_STEPS, start=5)
    assert set(detector.first_steps) == {"gradient", "weight"}
    detector.observe(record(40, gradient(2)))
    assert detector.first_steps == {"gradient": (40, "c")}


def test_it_asks_for_weights_and_moments_at_each_new_source_and_before_an_incident_is_over() -> None:
    detector = NonFiniteDetector()
    detector.observe(record(1))
    assert not detector.asks
    asked = []
    weight = NonFinite("weight", "nan", ("c.w",), ("c",))
    sources = {2: (gradient(0),), 3: (gradient(0), weight), 4: (gradient(0), weight), 5: (weight,)}
    for step in range(2, 30):
        detector.observe(record(step, *sources.get(step, ())))
        asked += [step] if detector.asks else []
    assert asked == [2, 3, 5 + QUIET_STEPS // 2]


def test_its_event_is_critical_and_names_its_runbook() -> None:
    (event,) = NonFiniteDetector().observe(record(7, gradient(0)))
    assert (event.kind, event.severity, event.runbook) == ("nonfinite", "critical", "TrainingNonFinite")
