"""Resumes from real checkpoints: ten ways to break one are each named, and what is whole is left alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tests.agent.resume import resuming
from tests.agent.resume.resuming import Masters, Told, Training, adamw
from torch.optim import lr_scheduler

from optwatch import Settings, attach


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 100)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains and saves through a monitor, once for each kind of training: the folder of the checkpoint."""
    made: dict[Any, Path] = {}

    def make(*kinds: Any, **options: Any) -> Path:
        key = (*kinds, *options.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("saved")
            training = Training(*kinds, **options)
            settings = Settings(address="127.0.0.1", spool_directory=made[key] / "spool")
            monitor = attach(training.optimizer, model=training.model, port=0, settings=settings)
            training.train()
            training.save(monitor, made[key] / "last.pt")
            assert monitor.faults.counts == {}
            monitor.detach()
        return made[key]

    return make


@pytest.fixture
def checkpoint(saved_once: Any, tmp_path: Path) -> Callable[..., Path]:
    """The path of a checkpoint of one's own, with its fingerprint beside it."""

    def copy(*kinds: Any, **options: Any) -> Path:
        for file in saved_once(*kinds, **options).glob("last.pt*"):
            shutil.copy(file, tmp_path)
        return tmp_path / "last.pt"

    return copy


@pytest.fixture
def resume(watch: Any) -> Callable[..., dict[str, Any]]:
    """Resumes a new training from a checkpoint and takes a step: the faults that were told, by name."""

    def go(path: Path, *kinds: Any, load: Any = Training.load, named: bool = True, **options: Any) -> dict[str, Any]:
        training = Training(*kinds, seed=1, **options)
        monitor = watch(training.optimizer, model=training.model, resume_from=str(path) if named else None)
        told = Told(monitor)
        load(training, torch.load(path, weights_only=True))
        training.train(1)
        found: dict[str, Any] = told.faults()
        training.train(2)
        assert told.faults() == found
        monitor.detach()
        return found

    return go


# The ten faults: each takes the saved state apart as the thing itself would.
def drop_moments(saved: dict[str, Any]) -> None:
    del saved["optimizer"]["state"][0]


def reset_step(saved: dict[str, Any]) -> None:
    for state in saved["optimizer"]["state"].values():
        state["step"].zero_()


def cast(saved: dict[str, Any]) -> None:
    for state in saved["optimizer"]["state"].values():
        state |= {key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}


def overwrite_rate(saved: dict[str, Any]) -> None:
    saved["optimizer"]["param_groups"][0]["lr"] = 0.1


def overwrite_decay(saved: dict[str, Any]) -> None:
    saved["optimizer"]["param_groups"][0]["weight_decay"] = 0.5


def swap_groups(saved: dict[str, Any]) -> None:
    first, second = saved["optimizer"]["param_groups"]
    for key in set(first) - {"params"}:
        first[key], second[key] = second[key], first[key]


def reorder(saved: dict[str, Any]) -> None:
    state = saved["optimizer"]["state"]
    state[0], state[1] = state[1], state[0]


def shift_schedule(saved: dict[str, Any]) -> None:
    saved["scheduler"]["last_epoch"] = 0


def lose_generator(saved: dict[str, Any]) -> None:
    saved["generator"] = torch.Generator().manual_seed(7).get_state()


@pytest.mark.parametrize(
    ("change", "fault", "severity", "item", "expected", "found"),
    [
        (drop_moments, "moments_missing", "critical", "0.weight: exp_avg", "float32 [6, 6] of norm", "nothing"),
        (reset_step, "step_changed", "warning", "0.weight: step", "6", "0"),
        (cast, "dtype_cast", "warning", "0.weight: exp_avg", "float32", "rounded to 16 bits"),
        (overwrite_rate, "hyperparameters_overwritten", "warning", "group 0: lr", "0.01", "0.1"),
        (overwrite_decay, "hyperparameters_overwritten", "warning", "group 0: weight_decay", "0.01", "0.5"),
        (swap_groups, "groups_swapped", "critical", "group 0", "weight_decay = 0.01", "0, as group 1 had"),
        (reorder, "parameters_reordered", "critical", "0.weight: exp_avg", "its own", "that of 3.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_checkpoint_broken_in_one_way_is_told_by_that_name(
    change: Any, fault: str, severity: str, item: str, expected: str, found: str, checkpoint: Any, resume: Any
) -> None:
    path = checkpoint()
    resuming.rewrite(path, change)
    faults = resume(path)
    assert list(faults) == [fault]
    event = faults[fault]
    assert (event.kind, event.severity) == (
        "resumed_without_state" if fault == "moments_missing" else "audit_finding",
        severity,
    )
    assert str(path) in event.summary
    first = event.details["items"][0]
    assert first["name"] == item
    assert expected in first["expected"]
    assert found in first["found"]
    assert event.step == 1


def test_a_scheduler_at_another_step_is_told_once_and_not_its_rate_as_well(checkpoint: Any, resume: Any) -> None:
    path = checkpoint(adamw, cosine)
    resuming.rewrite(path, shift_schedule)
    faults = resume(path, adamw, cosine)
    assert list(faults) == ["scheduler_offset"]
    assert faults["scheduler_offset"].details["items"] == [
        {"name": "CosineAnnealingLR", "expected": "step 6", "found": "step 0"}
    ]


def test_a_generator_that_is_not_restored_is_told_by_name(checkpoint: Any, resume: Any) -> None:
    path = checkpoint()
    resuming.rewrite(path, lose_generator)
    faults = resume(path)
    assert list(faults) == ["generators_not_restored"]
    assert [item["name"] for item in faults["generators_not_restored"].details["items"]] == ["generator of torch"]


def test_one_bit_flipped_in_the_file_is_told_with_its_tensor(checkpoint: Any, resume: Any) -> None:
    path = checkpoint()
    resuming.flip_a_bit(path, torch.load(path, weights_only=True)["optimizer"]["state"][1]["exp_avg_sq"])
    faults = resume(path)
    assert list(faults) == ["contents_changed"]
    assert [item["name"] for item in faults["contents_changed"].details["items"]] == ["3.weight: exp_avg_sq"]


def masters(model: torch.nn.Module) -> torch.optim.Optimizer:
    return Masters(model.parameters(), lr=0.05)


def test_master_weights_that_are_gone_are_told(checkpoint: Any, resume: Any) -> None:
    path = checkpoint(masters, dtype=torch.bfloat16)
    assert resume(path, masters, dtype=torch.bfloat16) == {}

    def drop(training: Any, saved: dict[str, Any]) -> None:
        for i, state in saved["optimizer"]["state"].items():
            state["master"] = saved["model"][list(saved["model"])[i]].float()
        Training.load(training, saved)

    def cast_by_torch(training: Any, saved: dict[str, Any]) -> None:
        Training.load(training, saved)
        torch.optim.SGD.load_state_dict(training.optimizer, saved["optimizer"])

    assert list(resume(path, masters, dtype=torch.bfloat16, load=drop)) == ["masters_missing"]
    found = resume(path, masters, dtype=torch.bfloat16, load=cast_by_torch)
    assert sorted(found) == ["dtype_cast", "masters_missing"]
    assert found["dtype_cast"].details["items"][0] == {
        "name": "0.weight: momentum",
        "expected": "float32",
        "found": "bfloat16",
    }


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def nothing_to_keep(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def fused(model: torch.nn.Module) -> torch.optim.Optimizer:
    return adamw(model, fused=True)


def named(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.named_parameters(), lr=0.01)


def adafactor(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=0.01)


def tensor_rate(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01), capturable=False, foreach=False)


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=40)


def two_phases(optimizer: torch.optim.Optimizer) -> Any:
    phases = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, phases, milestones=[3])


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "dtype"),
    [
        (adamw, warm_up, torch.float32),
        (sgd, one_cycle, torch.float32),
        (named, two_phases, torch.float32),
        (fused, cosine, torch.float32),
        (sgd, None, torch.bfloat16),
        (adamw, cosine, torch.bfloat16),
        (nothing_to_keep, None, torch.float32),
        (adafactor, None, torch.float32),
        (tensor_rate, None, torch.float64),
    ],
)
def test_a_whole_resume_is_told_nothing(
    optimizer: Any, scheduler: Any, dtype: torch.dtype, checkpoint: Any, resume: Any
) -> None:
    path = checkpoint(optimizer, scheduler, dtype=dtype)
    assert resume(path, optimizer, scheduler, dtype=dtype) == {}


def with_rate_set_afterwards(training: Any, saved: dict[str, Any]) -> None:
    Training.load(training, saved)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.5


def with_the_model_left_out(training: Any, saved: dict[str, Any]) -> None:
    training.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["generator"])


def with_the_generator_left_out(training: Any, saved: dict[str, Any]) -> None:
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])


def groups_the_other_way_round(model: torch.nn.Module) -> torch.optim.Optimizer:
    """As many parameters in each group as `alike` has, in the other order."""
    first, second = [p for p in model.parameters() if p.shape == (6, 6)], [model[1].weight, model[1].bias]
    return torch.optim.AdamW([{"params": second, "weight_decay": 0.0}, {"params": first}], lr=0.01)


def alike(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, second = [p for p in model.parameters() if p.shape == (6, 6)], [model[1].weight, model[1].bias]
    return torch.optim.AdamW([{"params": first}, {"params": second, "weight_decay": 0.0}], lr=0.01)


def matrices(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([model[0].weight, model[3].weight], lr=0.01)


def matrices_reversed(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([model[3].weight, model[0].weight], lr=0.01)


def with_other_decay(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)


def plain(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("before", "now", "load", "fault"),
    [
        (adamw, adamw, with_rate_set_afterwards, "hyperparameters_overwritten"),
        (adamw, adamw, with_the_model_left_out, "weights_not_loaded"),
        (adamw, adamw, with_the_generator_left_out, "generators_not_restored"),
        (matrices, matrices_reversed, Training.load, "parameters_reordered"),
        (plain, with_other_decay, Training.load, "hyperparameters_overwritten"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_whole_checkpoint_loaded_wrongly_is_told_by_that_name(
    before: Any, now: Any, load: Any, fault: str, checkpoint: Any, resume: Any
) -> None:
    assert list(resume(checkpoint(before), now, load=load)) == [fault]


def test_groups_built_in_the_other_order_are_told_though_every_shape_agrees(checkpoint: Any, watch: Any) -> None:
    path = checkpoint(alike)
    training = Training(groups_the_other_way_round, seed=1)
    monitor = watch(training.optimizer, model=training.model, resume_from=str(path))
    told = Told(monitor)
    saved = torch.load(path, weights_only=True)
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["generator"])
    # torch itself finds nothing to complain about before the step, where shapes no longer fit.
    with pytest.raises(RuntimeError):
        training.train(1)
    assert list(told.faults()) == ["groups_swapped"]


def test_the_value_that_the_user_constructed_with_is_named(checkpoint: Any, resume: Any) -> None:
    faults = resume(checkpoint(plain), with_other_decay)
    item = faults["hyperparameters_overwritten"].details["items"][0]
    assert item == {
        "name": "group 0: weight_decay",
        "expected": "0.01",
        "found": "0.01 (the optimizer was constructed with 0.3)",
    }


@pytest.mark.parametrize("named", [True, False])
def test_state_that_is_wholly_missing_is_told_once_whether_or_not_the_run_said_what_it_resumes(
    named: bool, checkpoint: Any, watch: Any
) -> None:
    path = checkpoint()
    resuming.rewrite(path, lambda saved: saved["optimizer"]["state"].clear())
    training = Training(seed=1)
    monitor = watch(training.optimizer, model=training.model, resume_from=str(path) if named else None)
    told = Told(monitor)
    Training.load(training, torch.load(path, weights_only=True))
    training.train(2)
    assert monitor.flush(60)
    assert [event.kind for event in told.events] == ["resumed_without_state"]
    assert str(path) in told.events[0].summary


def test_a_rate_that_a_new_scheduler_gives_is_meant_and_one_that_a_loop_sets_by_hand_goes_on(
    checkpoint: Any, resume: Any, watch: Any, tmp_path: Path
) -> None:
    def meant(optimizer: torch.optim.Optimizer) -> Any:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = 0.002
        return lr_scheduler.ConstantLR(optimizer, 1.0)

    def set_anew(training: Any, saved: dict[str, Any]) -> None:
        Training.load(training, {**saved, "scheduler": {}})
        training.scheduler = meant(training.optimizer)

    assert resume(checkpoint(adamw, cosine), adamw, cosine, load=set_anew) == {}

    def by_hand(training: Any, step: int) -> None:
        for group in training.optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1) / 10
        training.train(1)

    training = Training()
    monitor = watch(training.optimizer, model=training.model)
    for step in range(3):
        by_hand(training, step)
    training.save(monitor, tmp_path / "by_hand.pt")
    monitor.detach()
    again = Training(seed=1)
    told = Told(watch(again.optimizer, model=again.model, resume_from=str(tmp_path / "by_hand.pt")))
    Training.load(again, torch.load(tmp_path / "by_hand.pt", weights_only=True))
    by_hand(again, 3)
    assert told.faults() == {}


def test_a_checkpoint_written_anew_by_somebody_else_is_not_held_against_its_old_fingerprint(
    checkpoint: Any, resume: Any
) -> None:
    path = checkpoint()
    other = Training(seed=3)
    other.train(2)
    torch.save(other.state(), path)
    assert resume(path) == {}


def test_training_is_the_same_to_the_bit_with_fingerprints_and_comparisons(checkpoint: Any, watch: Any) -> None:
    path = checkpoint(adamw, cosine)

    def go_on(watched: bool) -> list[float]:
        training = Training(adamw, cosine, seed=1)
        if watched:
            monitor = watch(training.optimizer, model=training.model, resume_from=str(path))
        Training.load(training, torch.load(path, weights_only=True))
        losses = training.train(3)
        if watched:
            training.save(monitor, path.with_name("next.pt"))
        return losses + training.train(3)

    assert go_on(watched=True) == go_on(watched=False)
    assert path.with_name("next.pt.optwatch-rank0.json").exists()


def test_a_finding_reaches_the_server_and_its_page(
    checkpoint: Any, watch: Any, real_server: Any, eventually: Any
) -> None:
    path = checkpoint()
    resuming.rewrite(path, reorder)
    training = Training(seed=1)
    monitor = watch(training.optimizer, model=training.model, resume_from=str(path), server=real_server.url)
    Training.load(training, torch.load(path, weights_only=True))
    training.train(1)
    assert monitor.flush(60)
    (event,) = eventually(lambda: real_server.events(monitor.run.id))
    assert (event["kind"], event["severity"]) == ("audit_finding", "critical")
    assert event["details"]["fault"] == "parameters_reordered"
    assert event["details"]["items"][0]["found"] == "that of 3.weight"
    page = httpx.get(f"{real_server.url}/runs/{monitor.run.id}", timeout=30, trust_env=False).text
    assert "that of 3.weight" in page
