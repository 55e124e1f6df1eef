"""/metrics over HTTP: the table behind prometheus-client's own server, on the port asked for or a free one."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.core import Metric as Family

from optwatch.faults import Faults

from .exposition import CONTENT_TYPE, Exposition
from .table import Table

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

logger = logging.getLogger("optwatch")


class Exporter:
    """Serves a table on ``http://address:port/metrics``, on threads of its own.

    A taken port falls back to a free one and says so. Port 0 asks for any free one.

    Raises:
        OSError: nothing can be bound on `address` at all.
    """

    def __init__(self, table: Table, refresh: Callable[[], None], address: str, port: int, faults: Faults) -> None:
        self._table = table
        self._exposition = Exposition(table)
        self._refresh = refresh
        self._faults = faults
        # A registry of our own: the user's process may export metrics of its own through the default one.
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            if port == 0 or error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise OSError(
                    error.errno, f"Settings(address={address!r}): {error.strerror}; give an address of this machine"
                ) from error
            self._server, self._thread = start_http_server(0, address, registry)
            logger.warning(
                "optwatch: port %d %s; metrics are on port %d instead (attach(port=0) asks for any free one)",
                port,
                "is taken" if error.errno == errno.EADDRINUSE else "is not for this user to bind",
                self._server.server_port,
            )
        self._library: WSGIApplication = make_wsgi_app(registry)
        self._server.set_app(self._answer)
        self.port: int = self._server.server_port
        self._pid = os.getpid()
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - not bound to
        self._reached_at = (host, self.port)
        self.url = f"http://[{host}]:{self.port}/metrics" if ":" in host else f"http://{host}:{self.port}/metrics"
        _serving.add(self)

    def describe(self) -> Iterator[Any]:
        """Nothing: names are the catalogue's, and registering must not read values."""
        return iter(())

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """The text format by our own renderer; whatever else is asked for (OpenMetrics, another method) by the
        library's, which is its oracle in the tests."""
        accepted = environ.get("HTTP_ACCEPT") or "*/*"
        plain = "text/plain" in accepted or "*/*" in accepted
        if environ["REQUEST_METHOD"] != "GET" or not plain:
            return self._library(environ, start_response)
        self._renew()
        start_response("200 OK", [("Content-Type", CONTENT_TYPE)])
        return self._blocks()

    def _blocks(self) -> Iterator[bytes]:
        try:
            yield from self._exposition.blocks()
        except Exception as error:  # noqa: BLE001
            self._faults.record("exporter", error)

    def _renew(self) -> None:
        try:
            self._refresh()
        except Exception as error:  # noqa: BLE001 - what the agent says of itself costs the training's series nothing
            self._faults.record("exporter", error)

    def collect(self) -> Iterator[Family]:
        """The families at this moment. A fault is counted and makes an empty scrape, not a broken server."""
        self._renew()
        try:
            yield from list(self._table.collect())
        except Exception as error:  # noqa: BLE001
            self._faults.record("exporter", error)

    def close(self) -> None:
        """Stop serving and free the port. In a forked child there is nothing to stop."""
        if os.getpid() != self._pid:
            return
        stopping = threading.Thread(target=self._server.shutdown, daemon=True)
        stopping.start()
        # The server looks twice a second whether it is to stop, and whenever somebody connects.
        with suppress(OSError):
            socket.create_connection(self._reached_at, 1).close()
        stopping.join()
        self._server.server_close()
        self._thread.join(2)

    def forked(self) -> None:
        """In a forked child: let go of the port. A worker that outlives its parent would keep it bound, unanswered."""
        self._server.socket.close()


_serving: WeakSet[Exporter] = WeakSet()


def _after_fork() -> None:
    for exporter in list(_serving):
        exporter.forked()


os.register_at_fork(after_in_child=_after_fork)
