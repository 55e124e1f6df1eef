"""Settings and targets: each documented, settable by name and by variable, and refused with what would fit."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from optwatch import Settings, Target
from optwatch import settings as module

# For every setting: a text that a variable may hold, and what comes of it.
VARIABLES: dict[str, tuple[str, object]] = {
    "sample_every": ("5", 5),
    "kernel": ("off", "off"),
    "activations": ("off", "off"),
    "skip_nonfinite_steps": ("true", True),
    "overhead_budget": ("0.5", 0.5),
    "max_layers": ("8", 8),
    "max_groups": ("3", 3),
    "loss_reduction": ("mean", "mean"),
    "aggregation": ("promql", "promql"),
    "address": ("127.0.0.1", "127.0.0.1"),
    "audit_silenced": ("lion-rate, empty-group", "lion-rate, empty-group"),
    "advertise": ("trainer-1", "trainer-1"),
    "spool_directory": ("/tmp/spool", Path("/tmp/spool")),
    "exit_timeout_seconds": ("0", 0.0),
    "spike_min_increase": ("0.5", 0.5),
}


def example(name: str, default: Any) -> tuple[str, object]:
    if name in VARIABLES:
        return VARIABLES[name]
    assert isinstance(default, (int, float)), f"say in VARIABLES what OPTWATCH_{name.upper()} may hold"
    return str(default + 1), default + 1


every_field = pytest.mark.parametrize("field", fields(Settings), ids=lambda field: field.name)


@every_field
def test_each_setting_can_be_given_as_a_variable(field: Any) -> None:
    text, value = example(field.name, field.default)
    made = Settings.from_environment({f"OPTWATCH_{field.name.upper()}": text})
    assert made == Settings(**{field.name: value})
    assert type(getattr(made, field.name)) is type(value)


@pytest.mark.parametrize("kind", [Settings, Target])
def test_each_setting_has_a_docstring_of_its_own(kind: type) -> None:
    body = ast.parse(inspect.getsource(module)).body
    (found,) = [node for node in body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    documented = {
        node.target.id
        for node, following in zip(found.body, found.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(following, ast.Expr)
        and isinstance(following.value, ast.Constant)
    }
    undocumented = {field.name for field in fields(kind)} - documented
    assert undocumented <= {"value", "by_step"}  # which the class's own docstring explains


def test_without_variables_they_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings.from_environment({"OPTWATCH_SAMPLE_EVERY": ""}) == Settings()
    monkeypatch.setenv("OPTWATCH_SAMPLE_EVERY", "3")
    assert Settings.from_environment().sample_every == 3


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("sample_every", 0, "give a whole number of 1 or more"),
        ("sample_every", 2.5, "give a whole number of 1 or more"),
        ("sample_every", True, "give a whole number of 1 or more"),
        ("sample_every", "10", "give a whole number of 1 or more"),
        ("max_layers", -1, "give a whole number of 1 or more"),
        ("max_groups", 0, "give a whole number of 1 or more"),
        ("ring_rows", 0, "give a whole number of 1 or more"),
        ("spool_max_bytes", 0, "give a whole number of 1 or more"),
        ("spike_window", 0, "give a whole number of 1 or more"),
        ("spike_warmup_steps", -1, "give a whole number of 0 or more"),
        ("heartbeat_interval_seconds", 0, "give a number above 0"),
        ("heartbeat_interval_seconds", float("nan"), "give a number above 0"),
        ("heartbeat_interval_seconds", 86_401, "give at most 86400 seconds"),
        ("request_timeout_seconds", -1.0, "give a number above 0"),
        ("request_timeout_seconds", float("inf"), "give at most 86400 seconds"),
        ("drift_deviations", 0, "give a number above 0"),
        ("drift_deviations", float("inf"), "give a number above 0"),
        ("spike_rarity", 1, "give a number above 1"),
        ("spike_rarity", float("inf"), "give a number above 1"),
        ("plateau_steps", 0, "give a whole number of 1 or more"),
        ("stall_seconds", 86_401, "give at most 86400 seconds"),
        ("exit_timeout_seconds", -0.1, "give a number of 0 or more"),
        ("exit_timeout_seconds", "3", "give a number of 0 or more"),
        ("spike_min_increase", -0.1, "give a number of 0 or more"),
        ("loss_reduction", "median", "give 'auto', 'sum' or 'mean'"),
        ("kernel", "fast", "give 'auto' or 'off'"),
        ("overhead_budget", 0.0, "give a number above 0"),
        ("overhead_budget", 1.01, "give a share of step time, at most 1"),
        ("audit_silenced", "lion", "give ids of rules, such as coupled-weight-decay, or all"),
        ("address", None, "give a text"),
        ("advertise", 5, "give a text"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_name_and_what_would(name: str, value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Settings({name}={value!r}): {told}") + "$"):
        Settings(**{name: value})


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("OPTWATCH_SAMPLE_EVERY", "often", "give a whole number of 1 or more"),
        ("OPTWATCH_SAMPLE_EVERY", "0", "give a whole number of 1 or more"),
        ("OPTWATCH_HEARTBEAT_INTERVAL_SECONDS", "10s", "give a number above 0"),
        ("OPTWATCH_EXIT_TIMEOUT_SECONDS", "inf", "give at most 86400 seconds"),
        ("OPTWATCH_LOSS_REDUCTION", "median", "give 'auto', 'sum' or 'mean'"),
    ],
)
def test_a_variable_that_does_not_fit_is_refused_by_its_own_name(variable: str, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{variable}={text!r}: {told}") + "$"):
        Settings.from_environment({variable: text})


def test_both_sides_of_each_bound_are_where_they_are_said_to_be() -> None:
    assert Settings(sample_every=1, exit_timeout_seconds=0, spike_warmup_steps=0, spike_min_increase=0)
    assert Settings(heartbeat_interval_seconds=86_400, request_timeout_seconds=1e-3)


def test_a_folder_may_be_given_as_text_and_under_ones_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    assert Settings(spool_directory="~/spool").spool_directory == Path("/home/u/spool")  # type: ignore[arg-type]
    assert Settings.from_environment({"OPTWATCH_SPOOL_DIRECTORY": "~/x"}).spool_directory == Path("/home/u/x")


@pytest.mark.parametrize("steps", [0, -5])
def test_a_target_needs_a_step_to_be_reached_by(steps: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Target(by_step={steps}): give the number of optimizer steps, 1")):
        Target("loss", 2.7, by_step=steps)
    assert Target("loss", 2.7, by_step=1)
