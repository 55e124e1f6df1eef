"""`optwatch server`: migrates the database, binds the port and serves until it is told to stop."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import socket
import sys
import threading

import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from .app import create_app
from .database.engine import ENVIRONMENT, Database, default_url
from .database.migration import migrate
from .service import Service
from .settings import (
    ALERTMANAGER_ENVIRONMENT,
    GRAFANA_ENVIRONMENT,
    PUBLIC_ENVIRONMENT,
    RECORDINGS_ENVIRONMENT,
    Settings,
)


class _Server(uvicorn.Server):
    """Says where it listens once it does: scripts wait for that line."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._ready, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optwatch server", description="Serve runs, heartbeats and events, and the pages people read."
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 picks a free one (default: %(default)s)")
    parser.add_argument(
        "--database-url",
        help="sqlite:////path/to/file.sqlite3 or postgresql://user:password@host/name "
        f"(default: ${ENVIRONMENT}, else a file in the user's data folder)",
    )
    parser.add_argument(
        "--alertmanager-url",
        metavar="URL[,URL]",
        help=f"Alertmanagers that get pages at once (default: ${ALERTMANAGER_ENVIRONMENT}, else only the rules page)",
    )
    parser.add_argument(
        "--public-url",
        metavar="URL",
        help=f"this server as browsers reach it, for links in pages (default: ${PUBLIC_ENVIRONMENT})",
    )
    parser.add_argument(
        "--grafana-url",
        metavar="URL",
        help=f"Grafana as browsers reach it, for links in pages (default: ${GRAFANA_ENVIRONMENT})",
    )
    parser.add_argument(
        "--recordings-url",
        metavar="URL",
        help=f"folder of the runs' black boxes: a path or any fsspec URL, such as s3://bucket/optwatch "
        f"(default: ${RECORDINGS_ENVIRONMENT}, else a folder beside the SQLite file)",
    )
    return parser


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to the address; uvicorn makes it listen.

    Raises:
        OSError: the address cannot be had; the text says what to do about it.
    """
    if not 0 <= port <= 65535:
        raise OSError(f"port {port} does not exist: choose one from 1 to 65535 with --port, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise OSError(f"host {host!r} cannot be resolved: choose an address of this machine with --host") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} on {host} is taken: stop what listens there, "
                "or choose another with --port (0 picks a free one)"
            ) from error
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}; see --host and --port") from error
    return listener


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit status: 0 after a clean stop, 1 where it could not start."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = Settings.read(
            alertmanager_url=options.alertmanager_url,
            public_url=options.public_url,
            grafana_url=options.grafana_url,
            recordings_url=options.recordings_url,
        )
        listener = _bind(options.host, options.port)
    except (ValueError, OSError) as error:
        print(f"optwatch server: {error}", file=sys.stderr)
        return 1
    with listener:
        try:
            database = Database(options.database_url or default_url())
            service = Service(database, settings=settings)
            if not migrate(database):
                print("optwatch server: the database is of a newer version; it is used as it is", file=sys.stderr)
        except (ValueError, OSError) as error:
            print(f"optwatch server: {error}", file=sys.stderr)
            return 1
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
            print(
                f"optwatch server: the database {database.shown} cannot be used ({reason}): "
                f"check that it is up and that --database-url or ${ENVIRONMENT} is right",
                file=sys.stderr,
            )
            return 1
        try:
            _serve(listener, options.host, service)
        finally:
            database.close()
    return 0


def _serve(listener: socket.socket, host: str, service: Service) -> None:
    port = listener.getsockname()[1]
    shown_host = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        create_app(service),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    server = _Server(config, f"optwatch server: http://{shown_host}:{port} (database {service.database.shown})")
    if threading.current_thread() is threading.main_thread():
        # uvicorn stops on SIGTERM and raises it again at the end, which would make a clean stop look like a death.
        signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return
    if not server.started:
        raise SystemExit(1)
