"""A receiver of Alertmanager's webhooks for demos and tests: keeps every notification, and can print pages as text.

Not a notifier to run in production: it listens on the loopback only and keeps everything in memory.
"""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, TextIO

RECEIVERS = ("page", "ticket")
"""Names of the receivers in alerts/alertmanager.yaml, and the paths under which they are received here."""

MAX_BODY_BYTES = 4 * 1024 * 1024
WIDTH = 100


@dataclass(frozen=True)
class Notification:
    """One webhook call of Alertmanager: a group of alerts that fire or have resolved."""

    receiver: str
    """``page`` or ``ticket``: the path it was sent to."""
    arrived_at: float
    """Unix time in seconds at which its body had been read."""
    payload: Mapping[str, Any]
    """The body as sent: Alertmanager's webhook format, version "4"."""

    @property
    def status(self) -> str:
        """``firing`` while any alert of the group fires, else ``resolved``."""
        return str(self.payload.get("status", ""))

    @property
    def alerts(self) -> tuple[Mapping[str, Any], ...]:
        """The group's alerts, each with ``status``, ``labels``, ``annotations``, ``startsAt`` and ``endsAt``."""
        return tuple(self.payload.get("alerts", ()))

    def names(self, label: str = "alertname") -> set[str]:
        """Return the values that `label` has among the alerts; alerts without it are left out."""
        return {alert["labels"][label] for alert in self.alerts if label in alert.get("labels", {})}


class Receiver:
    """Listens on 127.0.0.1 for webhooks at ``/page`` and ``/ticket`` while its ``with`` block runs.

    `port` 0 takes any free port. With `show`, each notification is also written there as `text` gives it.

    Raises:
        OSError: the port is taken (on construction).
    """

    def __init__(self, port: int = 0, show: TextIO | None = None) -> None:
        self._show = show
        self._arrived: list[Notification] = []
        self._changed = threading.Condition()
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.keep = self._keep
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="receiver", daemon=True)

    @property
    def port(self) -> int:
        """The port in use, also where 0 was asked for."""
        return int(self._server.server_address[1])

    @property
    def page_url(self) -> str:
        """Where Alertmanager sends pages."""
        return f"http://127.0.0.1:{self.port}/page"

    @property
    def ticket_url(self) -> str:
        """Where Alertmanager sends tickets."""
        return f"http://127.0.0.1:{self.port}/ticket"

    @property
    def notifications(self) -> tuple[Notification, ...]:
        """All that has arrived so far, oldest first: a copy, safe to keep."""
        with self._changed:
            return tuple(self._arrived)

    def wait_for(self, predicate: Callable[[Notification], bool], timeout: float) -> Notification:
        """Return the first notification, past or to come, for which `predicate` is true.

        `timeout` is in seconds. `predicate` is called on the caller's thread, at least once for each notification.

        Raises:
            TimeoutError: none came in time; the message lists what did.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            seen = 0
            while True:
                for notification in self._arrived[seen:]:
                    seen += 1
                    if predicate(notification):
                        return notification
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    came = [f"{n.receiver}: {', '.join(sorted(n.names()))} {n.status}" for n in self._arrived]
                    raise TimeoutError(f"no such notification within {timeout:g} s; arrived: {came or 'nothing'}")
                self._changed.wait(remaining)

    def start(self) -> Receiver:
        """Begin to listen. The ``with`` block does it."""
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and release the port; what has arrived stays readable. Repeating it changes nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Receiver:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _keep(self, notification: Notification) -> None:
        with self._changed:
            self._arrived.append(notification)
            if self._show is not None:
                self._show.write(text(notification) + "\n")
                self._show.flush()
            self._changed.notify_all()


def text(notification: Notification) -> str:
    """Return `notification` as a person should read it: what, which run, since when, what to open."""
    blocks = []
    for alert in notification.alerts:
        labels, annotations = alert.get("labels", {}), alert.get("annotations", {})
        resolved = alert.get("status") == "resolved"
        heading = (
            f"{notification.receiver.upper()}{' resolved' if resolved else ''}: {labels.get('alertname', 'unnamed')}"
        )
        lines = [heading, "-" * len(heading), annotations.get("summary", "")]
        run = labels.get("run", "")
        if run_id := labels.get("run_id"):
            run += f" ({run_id}), project {labels.get('project', 'unknown')}, team {labels.get('team', 'unknown')}"
        rows = {"Run": run, "Since": _time(alert.get("startsAt", ""))}
        if resolved:
            rows["Until"] = _time(alert.get("endsAt", ""))
        rows |= {
            "Details": annotations.get("description", ""),
            "Run page": annotations.get("run_url", ""),
            "Runbook": annotations.get("runbook_url", ""),
            "Dashboard": annotations.get("dashboard_url", ""),
        }
        lines += [_row(title, value) for title, value in rows.items() if value]
        blocks.append("\n".join(line for line in lines if line))
    return "\n\n".join(blocks)


def _row(title: str, value: str) -> str:
    start = f"  {title:<10} "
    if "://" in value:
        return start + value  # a link broken over two lines cannot be opened
    return textwrap.fill(value, WIDTH, initial_indent=start, subsequent_indent=" " * len(start), break_long_words=False)


def _time(rfc3339: str) -> str:
    """Return Alertmanager's time to the second, in UTC; what cannot be read is returned as it is."""
    try:
        # Go writes up to nine digits of a second, of which Python 3.10 reads none or three or six.
        moment = datetime.fromisoformat(rfc3339[:19]) if rfc3339.endswith("Z") else datetime.fromisoformat(rfc3339)
    except ValueError:
        return rfc3339
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that may wait to be taken: at the library's 5 a flood of notifications is refused."""
    daemon_threads = True
    keep: Callable[[Notification], None]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10  # seconds without a byte, after which a client's thread is given up

    def do_POST(self) -> None:
        receiver = self.path.strip("/")
        if receiver not in RECEIVERS:
            return self.send_error(404, explain="webhooks are received at /page and /ticket")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            return self.send_error(411)
        if not 0 <= length <= MAX_BODY_BYTES:
            return self.send_error(413, explain=f"at most {MAX_BODY_BYTES} bytes")
        try:
            payload = json.loads(self.rfile.read(length))
        except ValueError:
            payload = None
        alerts = payload.get("alerts") if isinstance(payload, dict) else None
        if not isinstance(alerts, list) or not all(isinstance(alert, dict) for alert in alerts):
            # 4xx tells Alertmanager not to send it again.
            return self.send_error(400, explain="expected a JSON object with a list `alerts`, as Alertmanager sends it")
        self.server.keep(Notification(receiver, time.time(), payload))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: what arrived is in `Receiver.notifications`."""
