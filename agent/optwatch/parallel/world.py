"""The whole model as the ranks agree on it: every parameter once, and which rank's numbers count for it."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from struct import pack, unpack
from typing import Any

import torch
from torch import Tensor

from optwatch.training import layers
from optwatch.training.rows import Layout

from .group import Group

SAME = 1e-9
"""Relative difference of two sums of the same weights that hardware or the order of summation may explain."""


@dataclass(eq=False)
class World:
    """One optimizer's parameters over all ranks. ``n`` are this rank's parameters, ``N`` all of them."""

    layout: Layout
    """Of the whole model: sizes are those of whole parameters."""
    positions: Tensor
    """Shape ``(n,)``, int64: where this rank's parameters are in that layout."""
    counts: Tensor
    """Shape ``(n,)``, bool: whether this rank's elements count in sums. Every element of the model counts once."""
    expected: Tensor
    """Shape ``(N,)``, int64: how many ranks count."""
    groups: slice
    """Where this rank's parameter groups are among those of all; empty where a rank before it has the same."""
    same: bool
    """Whether every rank holds all of the model, so that one rank's numbers are those of all."""
    partitioned: bool
    """Whether optimizer state of one parameter may be on any one of the ranks that hold it (ZeRO-1)."""
    unproven: list[list[tuple[int, ...]]] = field(default_factory=list)
    """By parameter (N), the copies that nothing but their name says are the same; empty where there is no doubt."""
    reason: str | None = None
    """Why there are no statistics of the whole model, where there are none."""

    @property
    def settled(self) -> bool:
        """Whether this rank's numbers are known to be those of every rank, so that nothing is left to be shared."""
        return self.same and not self.partitioned and not self.unproven and self.reason is None


def presume(layout: Layout, rank: int, size: int) -> World | None:
    """What is known without asking: where DistributedDataParallel keeps every parameter equal on all ranks, or a mesh
    of all ranks holds it, the others hold the same parameters. Else None."""
    everywhere = tuple(range(size))
    known = (everywhere in (part.replicas, tuple(sorted(part.ranks or ()))) for part in layout.parts)
    if layout.partitioned or not all(known):
        return None
    return build([_said(layout)] * size, rank, layout, len(layout.layer_names))


def prove(group: Group, world: World, weights: Tensor, known: Tensor) -> None:
    """Compare the copies of which nothing but the name says that they are the same, by the squares of their weights.

    A stage of a pipeline may call its layers what another stage calls its own; and a model cut by hand has plain
    tensors of one name. To take these for replicas would make every norm wrong. ``weights`` and ``known`` have shape
    ``(n,)``.

    Raises:
        LostError: a rank did not take part.
    """
    mine = torch.full((len(world.layout.names),), float("nan"), dtype=torch.float64)
    mine[world.positions] = torch.where(known, weights, float("nan"))
    form = f"<{len(mine)}d"
    by_rank = [unpack(form, data) for data in group.gather(pack(form, *mine.tolist()))]
    for i, copies in enumerate(world.unproven):
        for first, other in chain.from_iterable(zip(copies[0], copy, strict=True) for copy in copies[1:]):
            a, b = by_rank[first][i], by_rank[other][i]
            if abs(a - b) > SAME * max(abs(a), abs(b)):
                world.reason = (
                    f"ranks {first} and {other} hold different weights under the name {world.layout.names[i]!r}; give "
                    "the stages of a model names of their own, or wrap replicas in DistributedDataParallel"
                )
    world.unproven = []


def _said(layout: Layout) -> dict[str, Any]:
    """A layout in the form in which ranks tell each other."""
    return {
        "names": layout.names,
        "sizes": layout.sizes,
        "groups": layout.groups,
        "group_count": layout.group_count,
        "ranks": [part.ranks for part in layout.parts],
        "replicas": [part.replicas for part in layout.parts],
        "stages": [part.stage for part in layout.parts],
        "partitioned": layout.partitioned,
    }


def agree(group: Group, layout: Layout, max_layers: int) -> World:
    """Agree with all ranks on what the model is.

    Where all ranks say the same, a digest is all that they exchange; else each different description goes round once.

    Raises:
        LostError: a rank did not take part.
    """
    own = _said(layout)
    text = zlib.compress(json.dumps(own).encode())
    digest = hashlib.sha256(text).digest()
    digests = group.gather(digest)
    speakers = {given: digests.index(given) for given in dict.fromkeys(digests)}
    said = {
        given: json.loads(zlib.decompress(group.broadcast(text, rank))) if len(speakers) > 1 else own
        for given, rank in speakers.items()
    }
    return build([said[given] for given in digests], group.rank, layout, max_layers)


def build(said: Sequence[dict[str, Any]], rank: int, layout: Layout, max_layers: int) -> World:
    """The world from what every rank says of itself (equal descriptions may be one object)."""
    kinds = list({id(own): own for own in said}.values())
    of_kind = {id(own): [r for r, given in enumerate(said) if given is own] for own in kinds}
    stages: dict[str, set[int | None]] = defaultdict(set)
    for own in kinds:
        for name, stage in zip(own["names"], own["stages"], strict=True):
            stages[name].add(stage)

    def key(name: str, stage: int | None) -> str:
        return name if len(stages[name]) == 1 or stage is None else f"stage{stage}.{name}"

    sizes: dict[str, int] = {}
    groups: dict[str, int] = {}
    copies: dict[str, dict[tuple[int, ...], tuple[int, ...] | None]] = defaultdict(dict)
    reason = None
    first_group: dict[int, int] = {}
    for own in kinds:
        first_group[id(own)] = sum(kinds[i]["group_count"] for i in range(len(first_group)))
        columns = (own[column] for column in ("names", "stages", "sizes", "groups", "ranks", "replicas"))
        for name, stage, size, in_group, ranks, replicas in zip(*columns, strict=True):
            whole = key(name, stage)
            if sizes.setdefault(whole, size) != size:
                reason = f"{name!r} has {sizes[whole]} elements on one rank and {size} on another: names must differ"
            groups.setdefault(whole, first_group[id(own)] + in_group)
            for copy in [tuple(ranks)] if ranks is not None else [(r,) for r in of_kind[id(own)]]:
                copies[whole][copy] = None if replicas is None else tuple(replicas)
    names = list(sizes)
    position = {name: i for i, name in enumerate(names)}
    ordered = [sorted(copies[name], key=min) for name in names]
    doubtful = []
    for name, several in zip(names, ordered, strict=True):
        kept_equal = copies[name][several[0]]
        trusted = all(kept_equal is not None and set(copy) <= set(kept_equal) for copy in several)
        doubtful.append([] if len(several) == 1 or trusted else several)
        if len({len(copy) for copy in several}) > 1:
            reason = f"{name!r} is cut over different numbers of ranks: its copies cannot be told apart"
    mine = [position[key(name, part.stage)] for name, part in zip(layout.names, layout.parts, strict=True)]
    counts = [
        part.counts and (part.ranks or (rank,)) == ordered[i][0] for i, part in zip(mine, layout.parts, strict=True)
    ]
    own = said[rank]
    start = first_group[id(own)]
    return World(
        layout=Layout(
            names=names,
            layers=layers.group_layers(names, max_layers),
            sizes=[sizes[name] for name in names],
            groups=[groups[name] for name in names],
            group_count=sum(kind["group_count"] for kind in kinds),
            device=torch.device("cpu"),
        ),
        positions=torch.tensor(mine, dtype=torch.int64),
        counts=torch.tensor(counts, dtype=torch.bool),
        expected=torch.zeros(len(names), dtype=torch.int64),
        groups=slice(start, start + (own["group_count"] if of_kind[id(own)][0] == rank else 0)),
        same=all(ranks is None for kind in kinds for ranks in kind["ranks"]) and len(kinds) == 1,
        partitioned=any(kind["partitioned"] for kind in kinds),
        unproven=doubtful if any(doubtful) else [],
        reason=reason,
    )
