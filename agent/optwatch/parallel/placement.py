"""What this rank holds of each parameter: read on the training thread, without any communication.

A parameter may be whole on each of several ranks (DDP), cut over the ranks of a mesh (FSDP2, tensor parallel), both at
once (HSDP), or be on one rank alone (a pipeline stage). The ranks of one mesh that hold it together hold one *copy*.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optwatch.kernels.plain import PLAIN
from optwatch.state import Stored
from optwatch.training.living import living

from . import store


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one parameter."""

    ranks: tuple[int, ...] | None = None
    """The ranks that hold this copy together, in the mesh's order; None where this rank holds all of it."""
    counts: bool = True
    """Whether its elements count in a sum over the copy. Of several ranks that hold the same elements one does: the one
    whose coordinate is 0 along each dimension of the mesh over which they are replicated."""
    replicas: tuple[int, ...] | None = None
    """The ranks whose copies DistributedDataParallel keeps equal to this one; None where it does not keep any."""
    stage: int | None = None
    """The pipeline stage that it belongs to, where ``torch.distributed.pipelining`` says so."""
    peers: tuple[int, ...] | None = None
    """The ranks, this one included, that hold the same elements and have to hold the same bits: those of a
    DistributedDataParallel, or of a mesh's dimensions over which it is replicated. None where nothing says so."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: the shard of a DTensor, which may be empty, else the tensor. To be called
    without gradients, where it is a look at an attribute; no communication."""
    if type(tensor) in PLAIN:
        return tensor
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def summable(parameter: Tensor) -> bool:
    """Whether its gradient is cut as the parameter is. A partial one (torch leaves those of a replicated parameter
    under sequence parallelism) is a summand of the gradient on each rank: no norm follows from the summands' norms."""
    placements = None if type(parameter) in PLAIN else getattr(parameter, "placements", None)
    return placements is None or getattr(parameter.grad, "placements", None) == placements


def size(parameter: Tensor) -> int:
    """Elements of the whole parameter, of which this rank may hold a part."""
    return parameter.numel() if type(parameter) in PLAIN else getattr(parameter, "whole_size", parameter.numel())


def in_model(parameter: Tensor) -> Tensor:
    """The model's parameter: what it is a part of where an optimizer trains parts of copies (`deepspeed`), else it."""
    return parameter if type(parameter) in PLAIN else getattr(parameter, "origin", parameter)


def describe(parameters: Sequence[Tensor]) -> list[Part]:
    """One part for each parameter.

    Walks the garbage collector's objects once where there are several ranks and plain tensors, as `layers.find_model`
    does: a parameter does not know that it is in a DistributedDataParallel or a pipeline stage.

    Raises:
        NotImplementedError: statistics would be wrong for one of them; the message says why.
    """
    where = store.world()
    wrapped = _wrappers(parameters) if where else {}
    parts = []
    for p in parameters:
        if getattr(p, "_fsdp_flattened", False):
            raise NotImplementedError(
                "parameters of FullyShardedDataParallel: a flattened shard does not say what it holds of which "
                "parameter, so norms and moments are unavailable; fully_shard (FSDP2) has exact ones"
            )
        if (refusal := getattr(p, "refusal", None)) is not None:
            raise NotImplementedError(refusal)
        if (part := getattr(p, "part", None)) is not None:
            parts.append(part)
            continue
        if hasattr(p, "ds_id"):
            raise NotImplementedError(
                "parameters of DeepSpeed ZeRO-3: they are empty between uses, so norms and moments are unavailable; "
                "call attach(optimizer) with the optimizer that deepspeed.initialize() returns"
            )
        if getattr(p, "tensor_model_parallel", False):
            raise NotImplementedError(
                "parameters cut by hand (tensor_model_parallel): a plain tensor does not say over which ranks, so "
                "norms and moments are unavailable; those cut with parallelize_module (DTensor) have exact ones"
            )
        replicas, stage = wrapped.get(id(p), (None, None))
        if not hasattr(p, "placements"):
            parts.append(Part(replicas=replicas, stage=stage, peers=_several(replicas)))
            continue
        ranks, counts, peers = _in_mesh(p)
        parts.append(Part(ranks, counts, replicas, stage, _several(replicas) or _several(peers)))
    return parts


def _several(ranks: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return ranks if ranks is not None and len(ranks) > 1 else None


def _in_mesh(parameter: Any) -> tuple[tuple[int, ...], bool, tuple[int, ...] | None]:
    """The ranks of its mesh, whether this rank's elements count, and the ranks that hold the same elements."""
    mesh, placements = parameter.device_mesh, parameter.placements
    if any(placement.is_partial() for placement in placements):
        raise NotImplementedError(
            f"a parameter with placements {placements}: a sum's norm does not follow from its summands' norms, so "
            "norms and moments are unavailable"
        )
    ranks = tuple(int(rank) for rank in mesh.mesh.flatten().tolist())
    coordinate = mesh.get_coordinate()
    replicated = [i for i, placement in enumerate(placements) if placement.is_replicate()]
    if coordinate is None:
        return ranks, False, None
    along = tuple(slice(None) if i in replicated else coordinate[i] for i in range(len(placements)))
    peers = tuple(sorted(int(rank) for rank in mesh.mesh[along].flatten().tolist()))
    return ranks, all(coordinate[i] == 0 for i in replicated), peers


def _wrappers(parameters: Sequence[Tensor]) -> dict[int, tuple[tuple[int, ...] | None, int | None]]:
    """By ``id`` of a parameter: the ranks of the DistributedDataParallel around it, and its pipeline stage."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    pipelining: Any = sys.modules.get("torch.distributed.pipelining.stage")
    stages = getattr(pipelining, "_PipelineStageBase", None)
    wanted = {id(p) for p in parameters}
    replicas: dict[int, tuple[int, ...]] = {}
    numbers: dict[int, int] = {}
    for candidate in living(DistributedDataParallel, *([stages] if stages else [])):
        if isinstance(candidate, DistributedDataParallel):
            ranks = tuple(sorted(dist.get_process_group_ranks(candidate.process_group)))
            replicas.update((id(p), ranks) for p in candidate.parameters() if id(p) in wanted)
        else:
            numbers.update((id(p), candidate.stage_index) for p in candidate.submod.parameters() if id(p) in wanted)
    return {i: (replicas.get(i), numbers.get(i)) for i in wanted}


def held(moment: Stored | None, parameter: Tensor) -> Stored | None:
    """What this rank holds of an optimizer's moment, as `state` reads it; None where that is not known.

    The moment of a sharded parameter has to be cut exactly as the parameter is. Factors of a sharded matrix (Adafactor,
    Shampoo) are not: which of their entries belong to which shard differs from optimizer to optimizer.
    """
    placements = None if type(parameter) in PLAIN else getattr(parameter, "placements", None)
    if moment is None or placements is None:
        return moment
    cut_alike = isinstance(moment, Tensor) and getattr(moment, "placements", None) == placements
    return local(moment) if cut_alike else None  # type: ignore[arg-type]  # a tensor
