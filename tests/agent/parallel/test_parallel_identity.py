"""One id for all ranks of a run, without a variable to set."""

from __future__ import annotations

import threading

import pytest

from optwatch.parallel import store
from optwatch.parallel.identity import shared_id


def test_the_job_of_torchrun_names_the_run_on_every_rank_and_each_restart_is_another() -> None:
    job = {"TORCHELASTIC_RUN_ID": "job 17/a"}
    ids = [shared_id(f"own-{rank}", "train", rank, 2, job) for rank in range(2)]
    assert ids == ["train-job-17-a-0"] * 2
    assert shared_id("own", "train", 0, 2, job | {"TORCHELASTIC_RESTART_COUNT": "3"}) == "train-job-17-a-3"
    assert len(shared_id("own", "t" * 100, 0, 2, {"TORCHELASTIC_RUN_ID": "j" * 300})) <= 128


@pytest.mark.parametrize("environment", [{}, {"TORCHELASTIC_RUN_ID": "none"}])
def test_where_nothing_names_the_run_only_further_ranks_are_told_so(
    environment: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert shared_id("own", "train", 0, 2, environment) == "own"
    assert not caplog.messages
    assert shared_id("own", "train", 1, 2, environment) == "own"
    assert "attach after init_process_group, or set OPTWATCH_RUN_ID" in caplog.messages[0]


def test_a_store_that_does_not_answer_is_waited_for_no_longer_than_said() -> None:
    answers = threading.Event()
    with pytest.raises(TimeoutError, match=r"has not answered for 0\.05 s"):
        store.within(0.05, lambda: answers.wait(60))
    answers.set()
    assert store.within(5, lambda: "answer") == "answer"


def test_what_a_store_raises_is_raised() -> None:
    def refuse() -> str:
        raise RuntimeError("connection refused")

    with pytest.raises(RuntimeError, match="connection refused"):
        store.within(5, refuse)
