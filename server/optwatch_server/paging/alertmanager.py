"""Alertmanager's API, version 2: posts alerts to every Alertmanager of a cluster."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from pydantic import JsonValue

TIMEOUT_SECONDS = 5.0


class AlertmanagerError(Exception):
    """An Alertmanager did not take alerts; the text says which and why, without a password.

    `refused` tells whether it was reached and did not like them, so that sending them one by one may help.
    """

    def __init__(self, text: str, *, refused: bool = False) -> None:
        super().__init__(text)
        self.refused = refused


def post(url: str, alerts: Sequence[JsonValue], timeout: float = TIMEOUT_SECONDS) -> None:
    """Send alerts to one Alertmanager and return once it has taken them. No proxy is asked, no redirect followed.

    `url` may have a path (Alertmanager's --web.route-prefix) and a user with a password. `timeout` is in seconds, for
    each wait.

    Raises:
        AlertmanagerError: it could not be reached, or refused them.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    shown = f"{parts.scheme}://{host}{'' if parts.port is None else f':{parts.port}'}{parts.path}"
    headers = {"Content-Type": "application/json"}
    if parts.username is not None:
        secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        headers["Authorization"] = f"Basic {base64.b64encode(secret).decode()}"
    connection = (
        http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=ssl.create_default_context())
        if parts.scheme == "https"
        else http.client.HTTPConnection(host, parts.port, timeout=timeout)
    )
    try:
        connection.request("POST", f"{parts.path}/api/v2/alerts", json.dumps(alerts, allow_nan=False), headers)
        response = connection.getresponse()
        answer = response.read(1000).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException) as error:
        raise AlertmanagerError(f"{shown} cannot be reached ({error or type(error).__name__})") from error
    finally:
        connection.close()
    if response.status != http.client.OK:
        refused = 400 <= response.status < 500
        raise AlertmanagerError(f"{shown} answered {response.status}: {answer or response.reason}", refused=refused)
