"""The agent's own process group: gloo on the CPU, built without any collective of the trainer's.

It is for the host thread alone. Every rank has to make the same calls in the same order, which `Group.meet` sees to:
ranks that are at different steps skip until they are at the same one. A call that fails or takes longer than its
timeout raises `LostError`; the group is of no use then, and the training of no rank has noticed anything.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

from . import store

logger = logging.getLogger("optwatch")

POLL_SECONDS = (0.02, 2.0)
"""First and longest wait between two looks at whether all ranks have come."""


MOST_SAID = 48
"""Numbers that a rank can say when it meets others."""


class LostError(RuntimeError):
    """The ranks can not be reached, or did not answer within the timeout."""


class Group:
    """A gloo process group over all ranks of the run, whose every call ends within ``timeout`` seconds.

    Made by `Forming`. Tensors are dense and on the CPU. No call touches a device or the trainer's process groups.
    """

    def __init__(self, client: Any, rank: int, size: int, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self.leaving = False
        """Set by any thread: no further call is begun."""
        self._timeout = timedelta(seconds=timeout)
        # Not dist.new_group: that is a collective on the trainer's group, and hangs where one rank does not attach.
        self._gloo: Any = dist.ProcessGroupGloo(client, rank, size, self._timeout)

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all ranks, in place. Equal shape and dtype on every rank.

        Raises:
            LostError: a rank did not take part within the timeout.
        """
        return self._reduce(values, dist.ReduceOp.SUM)

    def maximum(self, values: Tensor) -> Tensor:
        """The largest over all ranks, entry by entry, in place. Not for NaN, which may or may not win.

        Raises:
            LostError: as in `sum`.
        """
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank. Lengths may differ; each rank receives ``size`` times the longest.

        Raises:
            LostError: as in `sum`.
        """
        length = int(self.maximum(torch.tensor([len(data)]))[0])
        # Tensors on buffers of Python's: their bytes are read without numpy, which torch can do without.
        mine = _view(bytearray((len(data).to_bytes(8, "little") + data).ljust(8 + length, b"\0")))
        buffers = [bytearray(8 + length) for _ in range(self.size)]
        received = [_view(buffer) for buffer in buffers]
        self._finish(lambda: self._gloo.allgather([received], [mine]))
        return [bytes(buffer[8 : 8 + int.from_bytes(buffer[:8], "little")]) for buffer in buffers]

    def broadcast(self, data: bytes, root: int) -> bytes:
        """The bytes that rank `root` gave; what others give is not looked at.

        Raises:
            LostError: as in `sum`.
        """
        length = int(self.maximum(torch.tensor([len(data) if self.rank == root else 0]))[0])
        buffer = bytearray(data if self.rank == root else length)
        if length:
            options = dist.BroadcastOptions()
            options.rootRank, options.timeout = root, self._timeout
            self._finish(lambda: self._gloo.broadcast([_view(buffer)], options))
        return bytes(buffer)

    def meet(self, key: int, state: list[int]) -> tuple[list[int], list[int]] | None:
        """Meet the other ranks at one step.

        Args:
            key: ascends with what a rank does, and is the same for the same thing on every rank.
            state: what this rank says of it: at most `MOST_SAID` numbers. Their count belongs to the key.

        Returns:
            The least and the largest of each number over all ranks; None where another rank is further: then this
            rank's step can not be shared any more, and it has to come again with a later one.

        Raises:
            LostError: as in `sum`.
            ValueError: too many numbers.
        """
        if len(state) > MOST_SAID:
            raise ValueError(f"meet(state of {len(state)} numbers): give at most {MOST_SAID}")
        while True:
            # Of one size whatever is said: ranks that are at different things must be able to tell so.
            mine = torch.tensor([key, *state] + [0] * (MOST_SAID - len(state)), dtype=torch.int64)
            both = self.maximum(torch.cat([mine, -mine])).tolist()
            largest, least = both[: len(mine)], [-value for value in both[len(mine) :]]
            if largest[0] == least[0]:
                return least[1 : 1 + len(state)], largest[1 : 1 + len(state)]
            if key < largest[0]:
                return None

    def close(self) -> None:
        """Leave. Calls of other ranks fail from then on."""
        self._gloo = None

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        options = dist.AllreduceOptions()
        options.reduceOp, options.timeout = operation, self._timeout
        self._finish(lambda: self._gloo.allreduce([values], options))
        return values

    def _finish(self, start: Callable[[], Any]) -> None:
        try:
            if self._gloo is None or self.leaving:
                raise RuntimeError("this rank has left the group")
            start().wait()
        except Exception as error:
            # Gloo writes its source file in front and an advertisement behind: the sentence between them is the reason.
            reason = str(error).partition("] ")[2] or str(error)
            raise LostError(reason.partition(" This is typically")[0]) from error


class Forming:
    """Waits on a thread of its own until every rank has attached, then makes the group.

    Waiting is a look at the store's keys every two seconds at the most; a rank that never comes is waited for until
    `close`, at no cost to anything but this thread. ``generation`` counts the attempts of a run: ranks whose group was
    lost form the next one under new keys.
    """

    def __init__(self, name: str, generation: int, rank: int, size: int, timeout: float) -> None:
        self.generation = generation
        self._name = f"{name}/{generation}"
        self._rank, self._size, self._timeout = rank, size, timeout
        self._closed = threading.Event()
        self._done = threading.Event()
        self._group: Group | None = None
        self.announced = False
        """Whether other ranks can see that this one has come."""
        self.error: Exception | None = None
        """Why there is no group and none is being waited for any more."""
        self.missing: list[int] = list(range(size))
        """Ranks that had not attached at the last look."""
        self._thread = threading.Thread(target=self._run, name="optwatch-group", daemon=True)
        self._thread.start()
        _forming.add(self)

    def group(self, seconds: float) -> Group | None:
        """The group, waiting for it for at most `seconds`; None while there is none. Given out once."""
        self._done.wait(seconds)
        group, self._group = self._group, None
        return group

    def close(self) -> None:
        """Stop waiting for other ranks."""
        self._closed.set()

    def join(self) -> None:
        """Wait until its thread has ended, which connecting to other ranks holds up for its timeout at the most."""
        self._thread.join(self._timeout + 5)

    def _run(self) -> None:
        try:
            client: Any = store.prefixed(self._name, store.connect())
            client.set(f"attached/{self._rank}", "1")
            self.announced = True
            pause = POLL_SECONDS[0]
            while self.missing and not self._closed.wait(pause):
                while self.missing and client.check([f"attached/{self.missing[0]}"]):
                    del self.missing[0]
                # All have to notice within the timeout in which they then connect to each other.
                pause = min(POLL_SECONDS[1], self._timeout / 4, pause * 1.5)
            if not self._closed.is_set():
                began = time.monotonic()
                self._group = Group(client, self._rank, self._size, self._timeout)
                logger.debug("optwatch: joined %d ranks in %.3f s", self._size, time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - told by whoever asks for the group
            self.error = error
        finally:
            self._done.set()


_forming: WeakSet[Forming] = WeakSet()


@atexit.register
def _leave() -> None:
    """A thread that the interpreter's end meets inside torch's C++ takes the process with it (SIGABRT)."""
    for forming in list(_forming):
        forming.close()
        forming.join()


def _view(buffer: bytearray) -> Tensor:
    return torch.frombuffer(buffer, dtype=torch.uint8)
