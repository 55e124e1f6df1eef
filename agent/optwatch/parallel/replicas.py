"""Compares ranks with each other every so many steps: replicas' bits, hyper-parameters, and who holds up the others.

For the host thread. What ranks exchange at a check is a few hundred bytes each while they agree: a hash over the
checksums of all tensors that the same ranks hold. Where hashes differ, 16 bytes a tensor follow, which name it.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from optwatch.events import Event
from optwatch.training.rows import Layout, Row

from . import differences, telling
from .differences import Mismatch
from .group import Group
from .ranks import Ranks

KIND = 1
"""Of what ranks do together (`Ranks.together`)."""
LEAST_STEPS = 50
"""Steps whose own time is known before ranks' times are compared."""
WAIT_SECONDS = 0.0005
CONFIRMED = 2
"""Checks in a row that have to find a mismatch or a straggler: what lasts for a moment is nobody's fault."""


@dataclass(eq=False)
class Read:
    """One tensor's checksum, as it was read at a step."""

    name: str
    of: str
    step: int
    peers: tuple[int, ...]
    key: int
    value: int


@dataclass(eq=False)
class Check:
    """What this rank has to say at one check."""

    at: int
    reads: dict[int, Read]
    head: dict[str, Any]


@dataclass(eq=False)
class Book:
    """What is kept of one optimizer from row to row."""

    layout: Layout
    identity: str
    """Equal on ranks that have the same parameters in the same groups and the same pipeline stage."""
    at: int = 0
    """The last check that this rank has come to."""
    reads: dict[int, Read] = field(default_factory=dict)
    groups: dict[str, Any] | None = None
    own: deque[float] = field(default_factory=lambda: deque(maxlen=LEAST_STEPS))
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=LEAST_STEPS))
    pending: Check | None = None
    diverged: set[tuple[int, ...]] = field(default_factory=set)
    """By whom it was named, at the last check."""
    mismatched: dict[tuple[Any, ...], int] = field(default_factory=dict)
    """Checks in a row that have found it."""
    slow: dict[int, int] = field(default_factory=dict)


class Replicas:
    """Takes every row after `Ranks.complete`, and gives what is to be told.

    Args:
        ranks: the others.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._books: dict[str, Book] = {}
        self.checks = 0
        """Comparisons in which all ranks have taken part."""

    def observe(self, row: Row) -> list[Event]:
        """Keep what a row has, and compare with the other ranks where a check is due.

        Waits for the other ranks' host threads to come to the same check, for at most
        ``Settings.rank_timeout_seconds``. A rank that has no row of that step comes with its next one.
        """
        if row.checked is None:
            return []
        self._ranks.prepare()
        book = self._books.get(row.optimizer)
        if book is None or book.layout is not row.layout:
            book = self._books[row.optimizer] = Book(row.layout, _identity(row.layout))
        every = row.checked.every
        self._keep(book, row)
        if (at := row.count // every * every) > book.at:
            book.at, book.pending = at, _check(book, at)
            book.reads = {}
        if book.pending is None:
            return []
        check = book.pending
        joined = self._ranks.group is not None
        said = self._ranks.together(row, KIND, lambda group: _exchange(group, check), at=check.at)
        if said is None:
            if joined and self._ranks.group is None:  # lost: the others have been through this check, or never will
                book.pending = None
            return []
        book.pending = None
        self.checks += 1
        return self._compared(row.optimizer, book, check, *said)

    def _keep(self, book: Book, row: Row) -> None:
        assert row.checked is not None  # noqa: S101 - the caller's
        for reading in row.checked.readings:
            while not reading.arrival.done():
                time.sleep(WAIT_SECONDS)
            sums = reading.sums.tolist()
            for i, (index, of) in enumerate(reading.tensors):
                name, peers = row.layout.names[index], row.layout.parts[index].peers
                assert peers is not None  # noqa: S101 - only replicated ones are read
                key, value = _hash(f"{name}\0{of}\0{row.count}"), _hash(f"{sums[2 * i]},{sums[2 * i + 1]}")
                book.reads[key] = Read(name, of, row.step, peers, key, value)
        if (groups := row.checked.groups) is not None:
            sent = row.layout.learning_rates(row.values).tolist()
            for i, rate in enumerate(row.learning_rates):
                if rate is None:  # a tensor, which has come with the row
                    groups[i]["lr"] = sent[i]
            book.groups = {"count": row.count, "step": row.step, "groups": groups}
        if row.checked.own is not None and row.duration is not None and not row.skipped:
            began, ended = row.checked.own
            book.own.append(ended.since(began))
            book.durations.append(row.duration)

    def _compared(
        self, optimizer: str, book: Book, check: Check, heads: list[dict[str, Any]], sums: list[dict[int, int]] | None
    ) -> list[Event]:
        rank = self._ranks.rank
        alike = {r: head for r, head in enumerate(heads) if head["identity"] == book.identity}
        events = []
        named = {} if sums is None else differences.tensors({k: x.peers for k, x in check.reads.items()}, sums)
        for ranks, keys in named.items():
            if ranks not in book.diverged and ranks[0] == rank:
                reads = sorted((check.reads[key] for key in keys), key=lambda read: read.step)
                events.append(
                    telling.divergence(optimizer, ranks, [(x.name, x.of, x.step) for x in reads], reads[0].peers)
                )
        book.diverged = set(named)

        mine = heads[rank]["groups"]
        same = {
            r: h["groups"] for r, h in alike.items() if mine and h["groups"] and h["groups"]["count"] == mine["count"]
        }
        mismatches = {(x.ranks, x.group, x.name): x for x in differences.hyperparameters(same)}
        book.mismatched = {key: book.mismatched.get(key, 0) + 1 for key in mismatches}
        certain = [x for key, x in mismatches.items() if book.mismatched[key] == CONFIRMED and x.ranks[0] == rank]
        if certain:
            events.extend(self._mismatch(optimizer, check.at, certain))
        own = {r: head["own"] for r, head in alike.items() if head["own"] is not None}
        step_seconds = statistics.median(head["duration"] for head in alike.values() if head["own"]) if own else 0.0
        slow = differences.stragglers(own, step_seconds)
        book.slow = {r: book.slow.get(r, 0) + 1 for r in slow}
        if book.slow.get(rank) == CONFIRMED:
            events.append(telling.straggler(optimizer, rank, check.at, own, slow[rank], step_seconds))
        return events

    @staticmethod
    def _mismatch(optimizer: str, step: int, certain: list[Mismatch]) -> list[Event]:
        """One event for all that the same ranks have otherwise."""
        by_ranks: dict[tuple[int, ...], list[Mismatch]] = {}
        for one in certain:
            by_ranks.setdefault(one.ranks, []).append(one)
        return [telling.mismatch(optimizer, step, several) for several in by_ranks.values()]


def _check(book: Book, at: int) -> Check:
    by_peers: dict[tuple[int, ...], list[Read]] = {}
    for read in book.reads.values():
        by_peers.setdefault(read.peers, []).append(read)
    head = {
        "identity": book.identity,
        "groups": book.groups,
        "own": statistics.median(book.own) if len(book.own) == LEAST_STEPS else None,
        "duration": statistics.median(book.durations) if book.durations else None,
        "sums": [
            [peers, f"{_hash(' '.join(f'{r.key}:{r.value}' for r in sorted(reads, key=lambda r: r.key))):x}"]
            for peers, reads in by_peers.items()
        ],
    }
    return Check(at, book.reads, head)


def _exchange(group: Group, check: Check) -> tuple[list[dict[str, Any]], list[dict[int, int]] | None]:
    """What every rank says; and where hashes differ, every tensor's checksum by rank. Alike on every rank."""
    heads = [json.loads(data) for data in group.gather(json.dumps(check.head).encode())]
    known = [{tuple(peers): total for peers, total in head["sums"]} for head in heads]
    if all(len({known[rank].get(peers) for rank in peers}) == 1 for own in known for peers in own):
        return heads, None
    packed = b"".join(struct.pack("<QQ", read.key, read.value) for read in check.reads.values())
    return heads, [dict(struct.iter_unpack("<QQ", data)) for data in group.gather(packed)]


def _identity(layout: Layout) -> str:
    stages = [part.stage for part in layout.parts]
    return f"{_hash(json.dumps([layout.names, layout.groups, layout.group_count, stages])):x}"


def _hash(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
