"""What the server is told by its environment besides its database: where Alertmanager is, links, and cost."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from .shipping.configuration import GRAFANA, SERVER

ALERTMANAGER_ENVIRONMENT = "OPTWATCH_ALERTMANAGER_URL"
PUBLIC_ENVIRONMENT = "OPTWATCH_PUBLIC_URL"
GRAFANA_ENVIRONMENT = "OPTWATCH_GRAFANA_URL"
COST_ENVIRONMENT = "OPTWATCH_COST_PER_DEVICE_HOUR"
RECORDINGS_ENVIRONMENT = "OPTWATCH_RECORDINGS_URL"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one server; the defaults are those of the shipped rules. See `Settings.read`."""

    alertmanagers: tuple[str, ...] = ()
    """URLs of the Alertmanagers that get pages at once, all of them; with none, only the rules page."""
    public_url: str = SERVER
    """URL of this server as people's browsers reach it."""
    grafana_url: str = GRAFANA
    """URL of Grafana as people's browsers reach it."""
    cost_per_device_hour: float | None = None
    """Cost of runs without a tag that says it, in any currency."""
    recordings_url: str | None = None
    """Folder of the recordings: a path, or any URL that fsspec knows (``s3://bucket/optwatch``); none: one beside the
    SQLite file, or in the user's data folder. Replicas have to share it."""

    @classmethod
    def read(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        alertmanager_url: str | None = None,
        public_url: str | None = None,
        grafana_url: str | None = None,
        recordings_url: str | None = None,
    ) -> Settings:
        """Return the settings that flags give, else the environment, else the defaults.

        Raises:
            ValueError: one of them cannot be used; the text names it, its value and the fix, in one line.
        """
        addresses = environment.get(ALERTMANAGER_ENVIRONMENT, "") if alertmanager_url is None else alertmanager_url
        return cls(
            alertmanagers=tuple(
                _url(f"--alertmanager-url or ${ALERTMANAGER_ENVIRONMENT}", part.strip(), "http://alertmanager:9093")
                for part in addresses.split(",")
                if part.strip()
            ),
            public_url=_url(
                f"--public-url or ${PUBLIC_ENVIRONMENT}",
                public_url or environment.get(PUBLIC_ENVIRONMENT) or SERVER,
                SERVER,
            ),
            grafana_url=_url(
                f"--grafana-url or ${GRAFANA_ENVIRONMENT}",
                grafana_url or environment.get(GRAFANA_ENVIRONMENT) or GRAFANA,
                GRAFANA,
            ),
            cost_per_device_hour=_cost(environment.get(COST_ENVIRONMENT, "")),
            recordings_url=recordings_url or environment.get(RECORDINGS_ENVIRONMENT) or None,
        )


def _url(name: str, text: str, example: str) -> str:
    try:
        parts = urlsplit(text)
        _ = parts.port  # says so itself where it is out of range
    except ValueError as error:
        raise ValueError(f"{name} cannot be read ({error}): give something like {example}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        shown = "" if "@" in text else f" is {text!r} and"  # it may hold a password
        raise ValueError(f"{name}{shown} is no http or https URL: give something like {example}")
    return text.rstrip("/")


def _cost(text: str) -> float | None:
    if not text:
        return None
    try:
        cost = float(text)
    except ValueError:
        cost = math.nan
    if not math.isfinite(cost) or cost < 0:
        raise ValueError(f"${COST_ENVIRONMENT} is {text!r}: give the cost of one device hour as a number, such as 2.5")
    return cost
