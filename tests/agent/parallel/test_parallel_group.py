"""The ranks' own process group, and what they agree on: threads stand for ranks, on real gloo connections."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from optwatch import Settings
from optwatch.faults import Faults
from optwatch.parallel import Group, LostError, Part, Ranks
from optwatch.parallel.ranks import WHOLE_MODEL
from optwatch.parallel.world import agree, build, presume, prove
from optwatch.record import StepRecord
from optwatch.training.rows import Layout

Together = Callable[..., list[Any]]


@pytest.fixture
def together() -> Iterator[Together]:
    """Runs a function of a group on each of several ranks at once; what each gave, errors included, by rank."""
    pools = []

    def run(size: int, work: Callable[[Group], Any], timeout: float = 20.0) -> list[Any]:
        store = dist.HashStore()
        pool = ThreadPoolExecutor(size)
        pools.append(pool)

        def rank_main(rank: int) -> Any:
            group = Group(dist.PrefixStore("test", store), rank, size, timeout)  # type: ignore[attr-defined]
            try:
                return work(group)
            except LostError as error:
                return error
            finally:
                group.close()

        return [future.result(60) for future in [pool.submit(rank_main, rank) for rank in range(size)]]

    yield run
    for pool in pools:
        pool.shutdown()


def test_sums_maxima_and_bytes_of_any_length_reach_every_rank(together: Together) -> None:
    def work(group: Group) -> Any:
        values = torch.tensor([1.0 + group.rank, 10.0], dtype=torch.float64)
        data = b"x" * group.rank * 1000
        given = b"from 1" if group.rank == 1 else b"ignored, and longer"
        return (
            group.sum(values.clone()).tolist(),
            group.maximum(values.clone()).tolist(),
            [len(each) for each in group.gather(data)],
            group.broadcast(given, 1),
            group.broadcast(b"", 0),
        )

    expected = ([6.0, 30.0], [3.0, 10.0], [0, 1000, 2000], b"from 1", b"")
    assert together(3, work) == [expected] * 3


def test_ranks_that_have_missed_steps_meet_at_the_first_one_that_all_have(together: Together) -> None:
    """Rank 0 has dropped steps 2 and 3, rank 1 step 5: both come with each step that they have, until they meet."""
    has = [[1, 4, 5, 6, 7], [1, 2, 3, 4, 6, 7]]

    def work(group: Group) -> Any:
        return [(step, group.meet(step, [group.rank, step])) for step in has[group.rank]]

    first, second = together(2, work)
    met = {1: ([0, 1], [1, 1]), 4: ([0, 4], [1, 4]), 6: ([0, 6], [1, 6]), 7: ([0, 7], [1, 7])}
    assert first == [(step, met.get(step)) for step in has[0]]
    assert second == [(step, met.get(step)) for step in has[1]]


def test_ranks_at_different_things_skip_what_is_not_shared(together: Together) -> None:
    """Rank 0 has lost the row of which rank 1 asks for more: what they say then has different lengths."""

    def work(group: Group) -> Any:
        met = [group.meet(8, [1])]
        if group.rank == 1:
            met.append(group.meet(9, [1, 2, 3]))
        return [*met, group.meet(16, [1, 2])]

    assert together(2, work) == [
        [([1], [1]), ([1, 2], [1, 2])],
        [([1], [1]), None, ([1, 2], [1, 2])],
    ]


def test_more_numbers_than_fit_are_refused(together: Together) -> None:
    def work(group: Group) -> Any:
        with pytest.raises(ValueError, match="meet\\(state of 49 numbers\\): give at most 48"):
            group.meet(1, [0] * 49)
        return group.meet(1, [0] * 48) is not None

    assert together(2, work) == [True, True]


def test_a_rank_that_does_not_answer_costs_the_timeout_and_no_more(together: Together) -> None:
    answered = threading.Event()

    def work(group: Group) -> Any:
        if group.rank == 1:
            answered.wait(60)
            return group.sum(torch.ones(1))  # too late: the other has closed the connection
        try:
            return group.sum(torch.ones(1))
        finally:
            answered.set()

    first, second = together(2, work, timeout=0.5)
    assert isinstance(first, LostError)
    assert "Timed out waiting 500ms" in str(first)
    assert isinstance(second, LostError)


def test_a_rank_that_has_left_is_missed_at_once(together: Together) -> None:
    first, _ = together(2, lambda group: group.sum(torch.ones(1)) if group.rank == 0 else None)
    assert isinstance(first, LostError)


def layout(names: list[str], parts: list[Part], sizes: list[int] | None = None) -> Layout:
    count = len(names)
    cpu = torch.device("cpu")
    return Layout(names, names, sizes or [6] * count, [0] * count, 1, cpu, parts=parts)


def test_a_rank_whose_process_ends_begins_nothing_more_with_the_others(together: Together) -> None:
    """Each further call could take the timeout again, and a process that ends waits for one timeout only."""

    def work(group: Group) -> Any:
        ranks = Ranks(Settings(), Faults())
        ranks._where = (group.rank, group.size)
        ranks.group = group
        assert ranks.joined() is group
        group.sum(torch.ones(1))
        ranks.leave()
        assert ranks.joined() is None
        return group.sum(torch.ones(1))

    assert [str(given) for given in together(2, work)] == ["this rank has left the group"] * 2


def test_every_element_counts_on_exactly_one_rank(together: Together) -> None:
    """Two meshes of two ranks hold a copy each; a stage of its own; a parameter that is whole on all ranks."""

    def work(group: Group) -> Any:
        mesh = (0, 2) if group.rank % 2 == 0 else (1, 3)
        own = layout(
            ["sharded", "whole", f"of rank {group.rank}"], [Part(ranks=mesh), Part(replicas=(0, 1, 2, 3)), Part()]
        )
        world = agree(group, own, 32)
        return world.layout.names, world.counts.tolist(), world.unproven

    results = together(4, work)
    names = ["sharded", "whole", *(f"of rank {rank}" for rank in range(4))]
    assert [counts for _, counts, _ in results] == [
        [True, True, True],
        [False, False, True],
        [True, False, True],
        [False, False, True],
    ]
    for found, _, unproven in results:
        assert sorted(found) == sorted(names)
        # Nothing but the name says that the two meshes hold the same.
        assert unproven[found.index("sharded")] == [(0, 2), (1, 3)]
        assert unproven[found.index("whole")] == []


@pytest.mark.parametrize(("other", "reason"), [(2.0, None), (2.0 + 1e-13, None), (2.0 + 1e-6, "different weights")])
def test_copies_are_taken_for_the_same_only_with_the_same_weights(
    other: float, reason: str | None, together: Together
) -> None:
    def work(group: Group) -> Any:
        world = agree(group, layout(["weight"], [Part()]), 32)
        assert not world.settled
        prove(group, world, torch.tensor([[2.0, other][group.rank]], dtype=torch.float64), torch.tensor([True]))
        return world.reason, world.settled

    for found, settled in together(2, work):
        assert (found is None) == (reason is None)
        assert reason is None or reason in found
        assert settled == (reason is None)


def test_one_name_with_two_sizes_is_refused() -> None:
    said = [
        {"names": ["w"], "sizes": [size], "groups": [0], "group_count": 1, "ranks": [None], "replicas": [None]}
        | {"stages": [None], "partitioned": False}
        for size in (6, 7)
    ]
    world = build(said, 0, layout(["w"], [Part()]), 32)
    assert world.reason == "'w' has 6 elements on one rank and 7 on another: names must differ"


def test_only_what_a_rank_knows_by_itself_is_presumed() -> None:
    replicated = layout(["w"], [Part(replicas=(0, 1))])
    known = presume(replicated, 0, 2)
    assert known is not None
    assert known.settled
    sharded = presume(layout(["w"], [Part(ranks=(0, 1))]), 0, 2)
    assert sharded is not None
    assert not sharded.settled
    assert presume(layout(["w"], [Part()]), 0, 2) is None
    assert presume(layout(["w"], [Part(replicas=(0, 1))]), 0, 4) is None
    assert presume(replace(replicated, partitioned=True), 0, 2) is None


def test_every_field_of_a_record_is_of_the_whole_model_or_of_this_rank() -> None:
    """A new statistic has to say which: a part's number must never be exported as the whole's."""
    own = {
        *("step", "optimizer", "started", "duration", "sampled", "skipped", "skipped_in_a_row"),
        *("loss", "loss_reduction", "micro_batches", "learning_rates", "weight_decays"),
        *("nonfinite", "nonfinite_before", "passes", "batch_ids", "grad_scale", "refused"),
        *("fresh_state", "state_bytes", "shard_sums"),
    }
    assert {field.name for field in fields(StepRecord)} == own | set(WHOLE_MODEL)
