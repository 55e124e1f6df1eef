"""Events about ranks that differ, in words."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from optwatch.events import Event

from .differences import Mismatch

MOST_NAMED = 20
"""Most tensors that an event lists."""


def divergence(
    optimizer: str, ranks: tuple[int, ...], tensors: Sequence[tuple[str, str, int]], peers: tuple[int, ...]
) -> Event:
    """Replicas that are not equal bit for bit.

    Args:
        optimizer: its name.
        ranks: those named.
        tensors: parameter, ``weight`` or an entry of its state, and the step after which it was read.
        peers: the ranks that ought to be equal.
    """
    name, of, step = tensors[0]
    what = f"{name!r} ({of})" + (f" and {len(tensors) - 1} more tensors" if len(tensors) > 1 else "")
    alone = len(ranks) == 1
    if alone:
        summary = f"Rank {ranks[0]} holds other bits than the {len(peers) - 1} ranks it replicates, in {what}"
    elif len(ranks) == len(peers):
        summary = f"Ranks {listed(ranks)} are replicas and hold different bits, in {what}"
    else:
        summary = f"Ranks {listed(ranks)} hold other bits than most of the {len(peers)} replicas, in {what}"
    return Event(
        kind="replica_divergence",
        step=step,
        occurred_at=time.time(),
        summary=f"{summary}, after step {step}.",
        likely=(
            f"Memory or a core of rank {ranks[0]}'s device, until shown otherwise: drain its node, and resume from a "
            "checkpoint from before this step."
            if alone
            else "With two replicas, or no majority, either may be wrong: test the devices of all of them. Where all "
            "differ from the start, they were not given the same weights. Resume from before this step, from one file."
        ),
        runbook="TrainingReplicaDivergence",
        details={
            "optimizer": optimizer,
            "ranks": list(ranks),
            "replicas": list(peers),
            "tensors": [{"parameter": name, "of": of, "step": step} for name, of, step in tensors[:MOST_NAMED]],
            "tensors_that_differ": len(tensors),
        },
    )


def mismatch(optimizer: str, step: int, found: Sequence[Mismatch]) -> Event:
    """Hyper-parameters, or the step, that one rank has otherwise than others; `found` are those of the same ranks."""
    ranks = found[0].ranks
    told = "; ".join(_values(one) for one in found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    who = f"Rank {ranks[0]} differs" if len(ranks) == 1 else f"Ranks {listed(ranks)} differ"
    return Event(
        kind="rank_mismatch",
        step=step,
        occurred_at=time.time(),
        summary=f"{who} from the replicas of {optimizer}: {told}.",
        likely="Ranks resumed from different files, or step their schedulers differently: replicas that step "
        "differently drift apart. Resume all ranks from one checkpoint.",
        runbook="TrainingRankMismatch",
        details={
            "optimizer": optimizer,
            "ranks": list(ranks),
            "differences": [
                {"group": one.group, "name": one.name, "values": {str(r): v for r, v in _few(one).items()}}
                for one in found[:MOST_NAMED]
            ],
        },
    )


def straggler(
    optimizer: str, rank: int, step: int, own: Mapping[int, float], ratio: float, step_seconds: float
) -> Event:
    """A rank that holds the others up; `own` are the seconds of a step that each rank works by itself."""
    lost = own[rank] * (1 - 1 / ratio)
    return Event(
        kind="straggler",
        step=step,
        occurred_at=time.time(),
        summary=f"Rank {rank} takes {own[rank] * 1e3:.1f} ms from the end of a step to its backward pass, {ratio:.1f} "
        f"times the median of the other ranks: all ranks wait about {lost * 1e3:.1f} ms of each step's "
        f"{step_seconds * 1e3:.1f} ms for it.",
        likely="Its data loader (slower disk, fewer workers, longer samples), its CPU (another process, throttling), "
        "or its GPU's clocks: compare them with another rank's. Backward passes are not part of this time.",
        runbook="TrainingStraggler",
        details={
            "optimizer": optimizer,
            "ranks": [rank],
            "ratio": ratio,
            "own_seconds": {str(r): seconds for r, seconds in sorted(own.items(), key=lambda x: -x[1])[:MOST_NAMED]},
            "step_seconds": step_seconds,
        },
    )


def listed(ranks: Sequence[int]) -> str:
    """Ranks in words: the first eight, and how many more."""
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _few(one: Mismatch) -> dict[int, object]:
    """Values of the ranks named, and of the first that is not."""
    others = [rank for rank in one.values if rank not in one.ranks][:1]
    return {rank: one.values[rank] for rank in [*one.ranks[:8], *others]}


def _values(one: Mismatch) -> str:
    where = one.name if one.group is None else f"{one.name} of group {one.group}"
    return f"{where} is " + ", ".join(f"{value!r} on rank {rank}" for rank, value in _few(one).items())
