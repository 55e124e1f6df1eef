"""What a run says of itself, and what ranks of one run do differently."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from optwatch import Target
from optwatch.lifecycle.run import RUN_ID, Run, describe, optimizer_names


def run(*optimizers: torch.optim.Optimizer, environment: dict[str, str] | None = None, **given: Any) -> Run:
    names = ("run", "project", "tags", "seed", "resume_from", "target")
    chosen = optimizers or (torch.optim.SGD([torch.zeros(2)], lr=0.1),)
    return describe(
        chosen, **(dict.fromkeys(names) | given), heartbeat_interval_seconds=10.0, environment=environment or {}
    )


@pytest.mark.parametrize("name", ["gpt small/2", "--", "ä" * 30, "x" * 256, ".hidden", "日本"])
def test_any_name_makes_an_id_that_the_server_takes_and_no_two_are_alike(name: str) -> None:
    first, second = run(run=name), run(run=name)
    assert first.name == name
    assert RUN_ID.fullmatch(first.id)
    assert first.id != second.id


def test_an_id_from_the_environment_is_taken_as_it_is() -> None:
    assert run(environment={"OPTWATCH_RUN_ID": "job-17.restart_2"}).id == "job-17.restart_2"


def test_hyperparameters_are_json_whatever_they_were() -> None:
    optimizer = torch.optim.AdamW(
        [{"params": [torch.zeros(3)], "lr": torch.tensor(0.5)}, {"params": [torch.zeros(2), torch.zeros(2)]}], lr=0.1
    )
    found = run(optimizer).hyperparameters["AdamW"]
    assert found["betas"] == [0.9, 0.999]
    assert found["groups"] == [
        {"lr": 0.5, "weight_decay": 0.01, "parameters": 3},
        {"lr": 0.1, "weight_decay": 0.01, "parameters": 4},
    ]
    json.dumps(found, allow_nan=False)


def test_optimizers_of_one_class_are_numbered_and_lose_nothing() -> None:
    optimizers = [torch.optim.SGD([torch.zeros(n)], lr=0.1) for n in (1, 2)] + [torch.optim.AdamW([torch.zeros(3)])]
    assert optimizer_names(optimizers) == ["SGD0", "SGD1", "AdamW"]
    described = run(*optimizers)
    assert described.optimizer == "SGD+SGD+AdamW"
    sizes = [described.hyperparameters[name]["groups"][0]["parameters"] for name in ("SGD0", "SGD1", "AdamW")]
    assert sizes == [1, 2, 3]


def test_a_group_without_parameters_is_no_obstacle() -> None:
    optimizer = torch.optim.SGD([{"params": []}, {"params": [torch.zeros(1)]}], lr=0.1)
    assert run(optimizer).device == "cpu"


def test_the_message_has_the_wires_fields_and_not_the_rank() -> None:
    message = run(target=Target("loss", 2.0, 10), environment={"RANK": "2", "OPTWATCH_RUN_ID": "r"}).message()
    assert message["schema"] == 1
    assert "rank" not in message
    assert message["target"]["metric"] == "loss"


@pytest.mark.parametrize("given", ["run-1", "step_100.pt"])
def test_what_could_be_a_runs_id_travels_as_one(given: str) -> None:
    message = run(resume_from=given).message()
    assert message["resumed_from"] == given
    assert "resume_from" not in message["tags"]


def test_a_checkpoints_path_travels_as_a_tag_since_the_server_takes_ids_only() -> None:
    message = run(resume_from="/ckpt/" + "x" * 300, tags={"a": "b"}).message()
    assert message["resumed_from"] is None
    assert message["tags"] == {"a": "b", "resume_from": "x" * 256}


def test_a_rank_that_cannot_know_the_runs_id_says_what_to_set(caplog: Any) -> None:
    run(environment={"RANK": "1", "WORLD_SIZE": "2", "OPTWATCH_RUN_ID": "r"})
    run(environment={"RANK": "0", "WORLD_SIZE": "2"})
    assert caplog.messages == []
    run(environment={"RANK": "1", "WORLD_SIZE": "2"})
    assert "set OPTWATCH_RUN_ID to one text for all ranks" in caplog.messages[0]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_creates_and_finishes_the_run_and_every_rank_beats_and_reports(
    rank: str, watch: Any, net: Any, step: Any, stand_in: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, text in {"RANK": rank, "WORLD_SIZE": "2", "OPTWATCH_RUN_ID": "shared"}.items():
        monkeypatch.setenv(variable, text)
    server = stand_in()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = watch(optimizer, server=server.url, heartbeat_interval_seconds=0.05)
    step(optimizer, float("nan"))
    assert monitor.flush(30)
    eventually(lambda: server.events() and server.bodies("/heartbeats"))
    monitor.detach()
    assert (len(server.bodies("/runs")), len(server.bodies("/finish"))) == ((1, 1) if rank == "0" else (0, 0))
    assert {event["rank"] for event in server.events()} == {int(rank)}
    assert {body["beats"][0]["rank"] for body in server.bodies("/heartbeats")} == {int(rank)}
    assert {event["run_id"] for event in server.events()} == {"shared"}


def test_two_monitors_of_one_run_id_in_one_process_keep_their_spools_apart(
    stand_in: Any, watch: Any, net: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTWATCH_RUN_ID", "same")
    server = stand_in()
    monitors = [watch(torch.optim.SGD(layer.parameters(), lr=0.1), server=server.url) for layer in net]
    eventually(lambda: len(server.bodies("/runs")) == 2)
    assert [monitor.faults.counts for monitor in monitors] == [{}, {}]
