"""Everything on this machine: the server, Prometheus, Alertmanager and a receiver of pages, wired as when deployed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from .receiver import Receiver
from .serving import serving
from .stack import Stack, free_port


@dataclass(frozen=True)
class Local:
    """What runs."""

    server: str
    """URL of the optwatch server."""
    receiver: Receiver
    """Where pages and tickets arrive."""
    stack: Stack
    """Prometheus and Alertmanager."""


@contextmanager
def local(directory: Path, *, direct: bool = True, show: TextIO | None = None) -> Iterator[Local]:
    """Run everything in `directory` with the shipped configuration, on free loopback ports, until the block ends.

    With `direct` the server also sends critical events to Alertmanager itself, at once. What arrives is written to
    `show` as a person reads it.

    Raises:
        StackError: Prometheus or Alertmanager is missing or does not start.
        RuntimeError: the server does not start.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # The stack first: the server has to know its Alertmanager, and the stack needs of the server only its address.
    with (
        Receiver(show=show) as receiver,
        Stack(directory / "stack", server=url, page_url=receiver.page_url, ticket_url=receiver.ticket_url) as stack,
    ):
        environment = {"OPTWATCH_PUBLIC_URL": url}
        if direct:
            environment["OPTWATCH_ALERTMANAGER_URL"] = stack.alertmanager_url
        with serving(directory / "server", port=port, environment=environment) as server:
            yield Local(server, receiver, stack)
