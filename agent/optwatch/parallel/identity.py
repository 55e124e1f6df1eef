"""Who this process is among the ranks, and one id for the run of all of them, without a variable to set."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Mapping

from . import store

logger = logging.getLogger("optwatch")

STORE_SECONDS = 5.0
"""Most seconds that attaching waits for the store of the process group to answer one request."""
_attachments = itertools.count()


def place() -> tuple[int, int] | None:
    """Rank and number of ranks of the default process group; None where there is none, or it is of one rank."""
    return store.world()


def shared_id(proposal: str, stem: str, rank: int, world_size: int, environment: Mapping[str, str]) -> str:
    """The id of this run, equal on all ranks.

    The ranks of a process group take the proposal of whichever attaches first, by one request to its store: none waits
    for another, so one that never attaches is not missed. Without a process group it is what torchrun calls the job,
    where that is a name of its own. Failing both, other ranks than the first are told what to do.

    Args:
        proposal: an id that no other run has.
        stem: what an id made from torchrun's begins with.
        rank: this process's.
        world_size: number of ranks.
        environment: the process's variables.
    """
    if place() is not None:
        key = f"run/{next(_attachments)}"
        try:
            return store.agree(key, proposal, STORE_SECONDS)
        except Exception as error:  # noqa: BLE001 - a store of another kind, or one that hangs: the run goes on
            logger.warning("optwatch: the ranks could not agree on the run's id by the store: %r", error)
    job = environment.get("TORCHELASTIC_RUN_ID", "none")
    if world_size > 1 and job != "none":
        restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{stem[:50]}-{job[-60:]}-{restart}")
    if rank > 0:
        logger.warning(
            "optwatch: rank %d does not know the run's id, and the server takes nothing from it; attach after "
            "init_process_group, or set OPTWATCH_RUN_ID to one text for all ranks",
            rank,
        )
    return proposal
