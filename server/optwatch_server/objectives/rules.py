"""Objectives as Prometheus rules in Sloth's form, which `scripts/generate_slo.py` writes to alerts/rules/slo.yaml."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from optwatch_server.shipping.configuration import GRAFANA, SERVER

from .slo import PERIOD, WINDOWS, Alert, Burn, Slo

CURRENT = "1h"
"""The window of `slo:current_burn_rate:ratio`: runs end minutes or hours apart, so that 5m would mostly see none."""
_SEVERITIES = {"page": "critical", "ticket": "warning"}
_KEEP = {"page": "15m"}

HEADER = """\
# Written by scripts/generate_slo.py from alerts/slo/*.yaml: change those, and run `make generate`.
#
# Service level objectives in Sloth's form, for Prometheus 2.42 and later. Every number here, and why it is what it is:
#
#   1m    how often all of it is evaluated: a fifth of the shortest window. More often, 30 days of samples would cost.
#   14.4 over 1h and 5m, 6 over 6h and 30m    page: 2% and 5% of a month's budget spent within the long window.
#   3 over 1d and 2h, 1 over 3d and 6h        ticket: 10% of a month's budget spent within the long window.
#   >= N  bad events that the long window holds, from the specification: with few events a ratio is noise.
#   15m   keep_firing_for of the pages: between two bad events the 5m window is empty, and one incident must not page
#         again at each of them.
#   no `for` anywhere: the long window has waited already.
#
# Both windows, because the long one alone would go on firing long after the burn has ended, and the short one alone is
# noise. The value of an alert is the burn rate of its long window.
#
# slo:sli_events:bad and :total are counters of their own, aggregated over replicas of the server *before* any increase
# is taken: a new pod, or two of them, changes no count. A status that is first seen at 1 raises a sum that was there
# before, so it counts; a project first seen with a history (a new Prometheus beside an old server) spends nothing.
#
# An error ratio is 0, not absent, where nothing ended: that spent no budget. It is absent where the server's counters
# are: then nothing is known, no alert fires, and OptwatchServerDown says why. clamp_min makes 0 / 0 a 0; as an increase
# is never below the events counted, it changes nothing else.
groups:
"""


def rules(slos: Sequence[Slo]) -> str:
    """Return the rule file, YAML with comments, for these objectives; addresses are those of `configuration`."""
    return HEADER + "\n".join(_group(slo) for slo in slos)


def _labels(slo: Slo, **more: str) -> str:
    labels = {"optwatch_slo": slo.name, "optwatch_service": slo.service, **more}
    return "{" + ", ".join(f"{name}: {value}" for name, value in labels.items()) + "}"


def _group(slo: Slo) -> str:
    period = f"slo:sli_error:ratio_rate{PERIOD}{_selector(slo)}"
    current = f"slo:sli_error:ratio_rate{CURRENT}{_selector(slo)}"
    records = [
        _record("slo:sli_events:total", slo.total, _labels(slo)),
        _record("slo:sli_events:bad", _bad(slo), _labels(slo)),
        *(_ratio(slo, window) for window in WINDOWS),
        _record("slo:objective:ratio", f"vector({slo.target})", _labels(slo)),
        _record("slo:current_burn_rate:ratio", f"max without (window) ({current}) / {slo.budget}", _labels(slo)),
        _record("slo:error_budget:ratio", f"1 - max without (window) ({period}) / {slo.budget}", _labels(slo)),
    ]
    # In one group, and the alerts last, so that they are judged and described by ratios of their own moment.
    head = f"  # {slo.title}: {_percent(slo)}.\n  - name: slo-{slo.name}\n    interval: 1m\n    rules:"
    return "\n".join([head, *records, *(_alert(slo, alert) for alert in slo.alerts)])


def _percent(slo: Slo) -> str:
    return f"{(slo.target * 100).normalize():f}% over 30 days"


def _selector(slo: Slo) -> str:
    return f'{{optwatch_slo="{slo.name}"}}'


def _record(name: str, expr: str, labels: str) -> str:
    return f"      - record: {name}\n        expr: |\n{textwrap.indent(expr, ' ' * 10)}\n        labels: {labels}\n"


def _bad(slo: Slo) -> str:
    """Return the counter of bad events: where none was ever bad it is 0, unless it is told by what was good."""
    if slo.bad is not None:
        # A missing `bad` beside a `total` is a series that nothing has made yet.
        return f"{slo.bad}\nor\n0 * {slo.total}"
    # A missing `good` is a name that changed: no count at all then, rather than one that everything is well.
    return f"{slo.total}\n-\n{slo.good}"


def _increase(slo: Slo, what: str, window: str) -> str:
    return f"sum by (optwatch_slo, optwatch_service) (increase(slo:sli_events:{what}{_selector(slo)}[{window}]))"


def _ratio(slo: Slo, window: str) -> str:
    expr = f"{_increase(slo, 'bad', window)}\n/\nclamp_min({_increase(slo, 'total', window)}, 1)"
    return _record(f"slo:sli_error:ratio_rate{window}", expr, _labels(slo, window=window))


def _condition(slo: Slo, burn: Burn) -> str:
    def burns(window: str) -> str:
        ratio = f"slo:sli_error:ratio_rate{window}{_selector(slo)}"
        return f"max without (window) ({ratio}) / {slo.budget} > {burn.factor:f}"

    enough = f"{_increase(slo, 'bad', burn.long)} >= {slo.minimum_bad_events}"
    return textwrap.indent(f"  {burns(burn.long)}\nand\n  {burns(burn.short)}\nand\n  {enough}", "  ")


def _alert(slo: Slo, alert: Alert) -> str:
    expr = "\nor\n".join(f"(\n{_condition(slo, burn)}\n)" for burn in alert.burns)
    keep = f"        keep_firing_for: {_KEEP[alert.notify]}\n" if alert.notify in _KEEP else ""
    budget = f"slo:error_budget:ratio{{optwatch_slo='{slo.name}'}}"
    return (
        f"      - alert: {alert.name}\n"
        f"        expr: |\n{textwrap.indent(expr, ' ' * 10)}\n"
        f"{keep}"
        f"        labels:\n"
        f"          severity: {_SEVERITIES[alert.notify]}\n"
        f"          notify: {alert.notify}\n"
        f"        annotations:\n"
        f"          summary: {alert.summary}\n"
        f"          description: >-\n"
        f"            {slo.bad_events} spend the error budget of {{{{ $labels.optwatch_slo }}}}"
        f" {{{{ $value | humanize }}}} times as fast as it lasts ({_percent(slo)}).\n"
        f'            {{{{ with query "{budget}" }}}}'
        "Budget left: {{ . | first | value | humanizePercentage }}.{{ end }}\n"
        f"            {slo.advice}\n"
        f"          runbook_url: {SERVER}/runbooks/{alert.name}\n"
        f"          dashboard_url: {GRAFANA}/d/optwatch-executive\n"
    )
