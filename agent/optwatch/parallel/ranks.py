"""What the ranks of a run make of their rows together: called by the host thread, once a row.

Rank 0 exports statistics of the whole model. Every rank exports what tells a culprit: its own loss, step time, learning
rate and non-finite tensors. Where the ranks cannot be reached, statistics of the whole model stop rather than become
those of a part, and each rank exports the sums over its own part instead.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar
from zlib import crc32

import torch

from optwatch.faults import Faults
from optwatch.host.rotation import BEFORE_STEP
from optwatch.host.unpack import Unpacker
from optwatch.record import StepRecord
from optwatch.settings import Settings
from optwatch.training.rows import EVERY_STEP, SAMPLED, Row

from . import store, totals, world
from .group import Forming, Group, LostError
from .shards import shard_sums
from .world import World

logger = logging.getLogger("optwatch")

WHOLE_MODEL = (
    "grad_norm",
    "grad_norm_before_clip",
    "grad_moment_cosine",
    "update_norm",
    "update_ratio",
    "weight_norm",
    "first_moment_norm",
    "second_moment_mean",
    "second_moment_max",
    "epsilon_dominated_ratio",
    "effective_learning_rates",
    "layers",
    "layer_grad_norm",
    "layer_weight_norm",
    "layer_update_ratio",
    "layer_first_moment_norm",
    "layer_second_moment_mean",
    "parameters",
    "parameter_grad_norm",
)
"""Fields of a record that are about all of the model; the others are about this rank."""
PARTIAL = (
    "some gradients are partial sums on each rank (DTensor's Partial, which torch leaves for a norm under sequence "
    "parallelism without fully_shard): no norm follows from the summands' norms, so gradient norms are unavailable"
)
LONGEST_PAUSE = 600.0
"""Most seconds between losing the other ranks and looking for them again; from the timeout on it doubles."""
KINDS = 8
"""Different things that ranks can do together at one step."""
T = TypeVar("T")
_attachments = itertools.count()


@dataclass(frozen=True, eq=False)
class Agreed:
    """What is known of the whole model, for the rows of one layout."""

    layout: object
    world: World | None
    presumed: bool
    """Whether it is what this rank knows by itself, and None where that is nothing."""


class Ranks:
    """The other ranks of the run. Everything here is for the host thread, and takes part in no collective of training.

    Args:
        settings: `aggregation` and `rank_timeout_seconds` are used.
        faults: counts what goes wrong between ranks, as ``ranks``.
    """

    def __init__(self, settings: Settings, faults: Faults) -> None:
        self._settings = settings
        self._faults = faults
        self._in_prometheus = settings.aggregation == "promql"
        # Ranks attach in the same order, so that what each calls its third attachment is one run.
        self._name = f"attachment/{next(_attachments)}"
        self._where: tuple[int, int] | None = None
        self._forming: Forming | None = None
        self._losses = 0
        self._again = 0.0
        self._waited = False
        self._partial_said = False
        self.group: Group | None = None
        """The ranks' process group while there is one. Its calls have to be made by every rank alike."""
        self._agreed: dict[str, Agreed] = {}
        self._steps: dict[str, int] = {}
        self._unpacker = Unpacker(settings.loss_reduction, settings.max_skipped_steps)
        self._leaving = False

    def complete(self, row: Row, record: StepRecord) -> None:
        """Make the record of this rank's row the one that this rank exports.

        Waits for the other ranks' rows of the same step where a sum over them is needed, for at most
        ``Settings.rank_timeout_seconds`` in all; then goes on without them.
        """
        self._where = self._where or store.world()
        if self._where is None or not row.layout.names:  # one process, or parameters of which nothing can be known
            return
        total = self._total(row)
        exports = self._where[0] == 0 and not self._in_prometheus
        if total is row and exports:
            return
        whole = StepRecord(0, "", 0.0) if total is None or not exports else self._unpacker.unpack(total)
        for field in WHOLE_MODEL:
            setattr(record, field, getattr(whole, field))
        if self._in_prometheus or (total is None and self.group is None):
            known = self._known(row)
            usable = known is not None and not known.unproven and known.reason is None
            record.shard_sums = shard_sums(row, known, record.skipped is not None) if known and usable else {}

    @property
    def rank(self) -> int:
        """This process's among them; 0 where there are no others."""
        return self._where[0] if self._where else 0

    def read_alike(self, optimizer: str) -> bool:
        """Whether ranks have to read the same at each step, since what they read of this optimizer is added up."""
        if self._where is None or self._in_prometheus:
            return False
        known = self._agreed.get(optimizer)
        return known is None or known.world is None or not (known.world.settled or known.world.reason is not None)

    def leave(self) -> None:
        """Begin nothing together with other ranks any more; what has begun ends by itself. From any thread."""
        self._leaving = True
        if (group := self.group) is not None:
            group.leaving = True

    def close(self) -> None:
        """Leave the other ranks. For the host thread: what it frees may still have work under way elsewhere."""
        if self._forming is not None:
            self._forming.close()
        if self.group is not None:
            self.group.close()

    def _total(self, row: Row) -> Row | None:
        """The row of the whole model: `row` itself where this rank holds all of it, None where there is none."""
        assert self._where is not None  # noqa: S101 - set by the caller
        self._steps[row.optimizer] = row.count
        known = self._known(row)
        if known is not None and (known.settled or known.reason):
            return row if known.reason is None else None
        agreed = known is not None and not known.unproven and not self._agreed[row.optimizer].presumed
        if agreed and self._in_prometheus:  # nothing is left to be exchanged at a step
            return None
        try:
            group = self.joined()
            return None if group is None else self._shared(group, row)
        except LostError as error:
            self._lost(error)
            return None

    def _known(self, row: Row) -> World | None:
        """The world of a row: agreed on, or else as far as it is known without asking."""
        assert self._where is not None  # noqa: S101 - set by the caller
        known = self._agreed.get(row.optimizer)
        if known is None or known.layout is not row.layout:
            known = self._agreed[row.optimizer] = Agreed(row.layout, world.presume(row.layout, *self._where), True)
        return known.world

    def _shared(self, group: Group, row: Row) -> Row | None:
        """The row of the whole model, from every rank's row of this step; None where some rank has none."""
        new = self._agreed[row.optimizer].presumed
        present = totals.sections(row)
        flags = [present >> i & 1 for i in range(len(totals.SECTIONS))]
        said = [row.step, int(row.sampled), int(row.partial_gradients), int(new), *flags]
        met = self._meet(group, row, 0, row.count, said)
        if met is None:
            return None
        (first_step, all_sampled, _, _, *by_all), (last_step, any_sampled, any_partial, any_new, *by_any) = met
        if any_new:
            agreed = world.agree(group, row.layout, self._settings.max_layers)
            agreed.expected[agreed.positions] = agreed.counts.to(torch.int64)
            group.sum(agreed.expected)
            self._say(agreed)
            self._agreed[row.optimizer] = Agreed(row.layout, agreed, False)
        known = self._known(row)
        assert known is not None  # noqa: S101 - agreed on just now or before
        if known.unproven and known.reason is None and by_all[totals.SECTIONS.index("weight")]:
            world.prove(group, known, *totals.own(row, "weight"))
            self._say(known)
        if known.unproven or known.reason is not None:
            return None
        if known.settled:
            return row
        if self._in_prometheus or first_step != last_step:  # one attached later, or resumed from elsewhere
            return None
        names = [name for name, any_rank in zip(totals.SECTIONS, by_any, strict=True) if any_rank]
        if all_sampled != any_sampled:  # weights and moments that only some ranks have read are nobody's sum
            names = [name for name in names if name not in SAMPLED]
        if any_partial:
            if not self._partial_said:
                self._partial_said = True
                self._faults.record("ranks", NotImplementedError(PARTIAL))
            names = [name for name in names if name not in (*EVERY_STEP, *BEFORE_STEP)]
        return totals.total(row, known, names, group)

    def _meet(self, group: Group, row: Row, kind: int, at: int, state: list[int]) -> tuple[list[int], list[int]] | None:
        """Least and largest of what the ranks say at one step; None where some rank is at another.

        Steps are those seen since attaching: they ascend whatever is loaded, and a rank whose optimizer counts
        otherwise than the others' is met, and told of.
        """
        same = [crc32(row.optimizer.encode()), at]
        others = sum(count for name, count in self._steps.items() if name != row.optimizer)
        met = group.meet((others + at) * KINDS + kind, same + state)
        if met is None or met[0][:2] != met[1][:2]:
            return None
        return met[0][2:], met[1][2:]

    def _say(self, agreed: World) -> None:
        if agreed.reason is not None:
            self._faults.record("ranks", NotImplementedError(f"norms and moments are unavailable: {agreed.reason}"))

    def together(self, row: Row, kind: int, work: Callable[[Group], T], at: int | None = None) -> T | None:
        """Do something with all other ranks at one step, or nothing: for the host thread, after `complete`.

        Every rank has to ask for it at the same steps. Where they are not all there, or are lost on the way, the result
        is None on each, and what was lost is said and counted here. Ranks that have not attached are not waited for.

        Args:
            row: the row just completed.
            kind: what it is, from 1 to ``KINDS - 1``; ascending where one row has several.
            work: calls the group alike on every rank; may raise `LostError`.
            at: the step (`Row.count`) that all ranks ask for, where a rank may have lost its row; none: the row's.
        """
        self._where = self._where or store.world()
        if self._where is None:
            return None
        self._steps[row.optimizer] = row.count
        try:
            group = self.joined(patient=False)
            if group is None or self._meet(group, row, kind, row.count if at is None else at, []) is None:
                return None
            return work(group)
        except LostError as error:
            self._lost(error)
            return None

    def prepare(self) -> bool:
        """Begin to look for the other ranks, waiting for none of them; whether they are there."""
        self._where = self._where or store.world()
        if self._where is not None:
            try:
                self.joined(patient=False)
            except LostError as error:
                self._lost(error)
        return self.group is not None

    def joined(self, patient: bool = True) -> Group | None:
        """The group, if all ranks have attached by now; the first `patient` call waits for them up to the timeout.

        Raises:
            LostError: they could not be joined.
        """
        assert self._where is not None  # noqa: S101 - set by the caller
        if self._leaving:
            return None
        if self.group is not None:
            return self.group
        timeout = self._settings.rank_timeout_seconds
        if self._forming is None:
            if time.monotonic() < self._again:
                return None
            self._forming = Forming(self._name, self._losses, *self._where, timeout)
        self.group = self._forming.group(timeout if patient and not self._waited else 0)
        if self.group is not None:
            if self._losses:
                logger.info(
                    "optwatch: all %d ranks are back, and statistics of the whole model begin again", self.group.size
                )
            self._forming = None
        elif self._forming.error is not None:
            raise LostError(f"the ranks could not be joined: {self._forming.error}")
        elif patient and not self._waited:
            self._faults.record(
                "ranks",
                LostError(
                    f"ranks {_listed(self._forming.missing)} have not attached within {timeout:g} s "
                    f"(Settings.rank_timeout_seconds): statistics of the whole model begin when they have"
                ),
            )
        self._waited = self._waited or patient
        return self.group

    def _lost(self, error: Exception) -> None:
        """Go on without the other ranks, and look for them again later."""
        assert self._where is not None  # noqa: S101 - set by the caller
        if self.group is not None:
            self.group.close()
        if self._forming is None or self._forming.announced:
            self._losses += 1  # the others form the next group as well
        self.group = self._forming = None
        pause = min(LONGEST_PAUSE, self._settings.rank_timeout_seconds * 2.0 ** min(max(0, self._losses - 1), 10))
        self._waited = True
        self._again = time.monotonic() + pause
        self._faults.record(
            "ranks",
            LostError(
                f"rank {self._where[0]} has lost the other ranks ({error}): statistics of the whole model stop where "
                "ranks have to be added up, and so do checks of replicas; each rank's own go on"
            ),
        )


def _listed(ranks: list[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
