"""Service level objectives: read from alerts/slo/*.yaml (OpenSLO v1), and refused where they make no sense."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import yaml
from pydantic import ValidationError

from . import openslo

WINDOWS = {"5m": 300, "30m": 1800, "1h": 3600, "2h": 7200, "6h": 21_600, "1d": 86_400, "3d": 259_200, "30d": 2_592_000}
"""Windows over which an error ratio is recorded, in seconds; the last one is that of the objectives themselves."""
PERIOD = "30d"

_ALERT = r"(Training|Optwatch)[A-Z][A-Za-z]{0,31}"
_PREFIX = "optwatch.io/"


@dataclass(frozen=True, slots=True)
class Burn:
    """One condition: the budget burns `factor` times as fast as it lasts, over the long and over the short window."""

    factor: Decimal
    long: str
    short: str


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert, and the conditions of which any one is enough."""

    name: str
    notify: str
    """``page`` or ``ticket``."""
    summary: str
    burns: tuple[Burn, ...]


@dataclass(frozen=True, slots=True)
class Slo:
    """One objective: this share of events is good over 30 days."""

    name: str
    title: str
    service: str
    description: str
    target: Decimal
    """Share of good events, above 0 and below 1."""
    good: str | None
    """PromQL for counters of good events; None where `bad` is given."""
    bad: str | None
    total: str
    minimum_bad_events: int
    """Bad events that an alert's long window has to hold, since with few events a ratio is noise."""
    bad_events: str
    """What a bad event is, as the beginning of a sentence."""
    advice: str
    """The last sentence of an alert: what to do."""
    alerts: tuple[Alert, ...]

    @property
    def budget(self) -> Decimal:
        """The share of events that may be bad, exactly."""
        return 1 - self.target


def load(folder: Path) -> list[Slo]:
    """Return the objectives of all files of a folder, by file name.

    Raises:
        OSError: the folder cannot be read.
        ValueError: a file is no specification that makes sense, two of them share a name, or there is none; the message
            names the file, the field, the value and what would do.
    """
    found: dict[str, Slo] = {}
    alerts: dict[str, str] = {}
    for path in sorted(folder.glob("*.yaml")):
        slo = parse(path.read_text(encoding="utf-8"), path.name)
        if slo.name in found:
            raise ValueError(f"{path.name}: another file defines {slo.name!r} too: give this one its own metadata.name")
        found[slo.name] = slo
        for alert in slo.alerts:
            if alert.name in alerts:
                raise ValueError(
                    f"{path.name}: the alert {alert.name} belongs to {alerts[alert.name]} already: rename one"
                )
            alerts[alert.name] = slo.name
    if not found:
        raise ValueError(f"{folder} holds no *.yaml: put at least one OpenSLO v1 file of kind SLO there")
    return list(found.values())


def parse(text: str, name: str) -> Slo:
    """Return the objective that a file of this name and text defines.

    Raises:
        ValueError: it makes no sense; see `load`.
    """
    try:
        document = openslo.Document.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        got = "" if first["type"] == "missing" else f" is {str(first['input'])[:80]!r}"
        others = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ValueError(f"{name}: {where}{got}: {first['msg']}{others}") from error
    spec, notes = document.spec, document.metadata.annotations
    ratio = spec.indicator.spec.ratioMetric
    if (ratio.good is None) == (ratio.bad is None):
        raise ValueError(f"{name}: spec.indicator.spec.ratioMetric needs one of good and bad beside total")
    minimum = _note(notes, "minimum-bad-events", name)
    if not re.fullmatch(r"[1-9][0-9]{0,5}", minimum):
        raise ValueError(f"{name}: {_PREFIX}minimum-bad-events is {minimum!r}: give a whole number from 1 on, as text")
    target = Decimal(str(spec.objectives[0].target))
    return Slo(
        name=document.metadata.name,
        title=document.metadata.displayName or document.metadata.name,
        service=spec.service,
        description=spec.description,
        target=target,
        good=None if ratio.good is None else ratio.good.metricSource.spec.query,
        bad=None if ratio.bad is None else ratio.bad.metricSource.spec.query,
        total=ratio.total.metricSource.spec.query,
        minimum_bad_events=int(minimum),
        bad_events=_note(notes, "bad-events", name),
        advice=_note(notes, "advice", name),
        alerts=_alerts(spec.alertPolicies, target, name),
    )


def _note(notes: dict[str, str], key: str, name: str) -> str:
    if not (value := notes.get(_PREFIX + key, "")):
        raise ValueError(f"{name}: metadata.annotations lacks {_PREFIX}{key}, which the alerts are made with")
    return value


def _alerts(policies: Sequence[openslo.Policy], target: Decimal, name: str) -> tuple[Alert, ...]:
    """Return the alerts: policies of one display name are one alert with several conditions, in their order."""
    alerts: dict[str, Alert] = {}
    for policy in policies:
        alert, (condition,) = policy.metadata.displayName, policy.spec.conditions
        if not re.fullmatch(_ALERT, alert):
            raise ValueError(
                f"{name}: alert policy {policy.metadata.name!r} has displayName {alert!r}: it is the alert's name, in "
                "at most 40 letters beginning with Training or Optwatch"
            )
        notify, (told,) = condition.spec.severity, policy.spec.notificationTargets
        summary = policy.spec.description
        if told.targetRef != notify:
            raise ValueError(
                f"{name}: {alert} has severity {notify!r} and tells {told.targetRef!r}: make them the same"
            )
        former = alerts.get(alert, Alert(alert, notify, summary, ()))
        if (former.notify, former.summary) != (notify, summary):
            raise ValueError(f"{name}: two policies of {alert} differ in severity or description: make them the same")
        burn = _burn(condition, alert, target, name)
        alerts[alert] = Alert(alert, notify, summary, (*former.burns, burn))
    return tuple(alerts.values())


def _burn(condition: openslo.Condition, alert: str, target: Decimal, name: str) -> Burn:
    factor = Decimal(str(condition.spec.condition.threshold)).normalize()
    long, short = condition.spec.condition.lookbackWindow, condition.metadata.annotations.get(_PREFIX + "short-window")
    if short not in WINDOWS or WINDOWS[short] >= WINDOWS[long]:
        shorter = (
            ", ".join(window for window in WINDOWS if WINDOWS[window] < WINDOWS[long]) or "none: lengthen the other"
        )
        raise ValueError(
            f"{name}: {alert} has {_PREFIX}short-window {short!r} beside lookbackWindow {long}: choose one of {shorter}"
        )
    if factor * (1 - target) >= 1:
        raise ValueError(
            f"{name}: {alert} can never fire: a burn of {factor:f} at target {target} asks for an error ratio above "
            f"{factor:f} × (1 − {target}) = {factor * (1 - target):f}, and no ratio exceeds 1: take a factor below "
            f"{float(1 / (1 - target)):.6g}, or a target above {float(1 - 1 / factor):.6g}"
        )
    return Burn(factor, long, short)
