"""The parts of the Prometheus operator's CRDs that the chart uses, by hand: what is not written here is refused.

kubernetes-validate knows Kubernetes' own types only. The Prometheus operator prunes or refuses unknown fields, so a
misspelt one has to fail here.
"""

from __future__ import annotations

from typing import Any

import jsonschema

TEXT = {"type": "string", "minLength": 1}
DURATION = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d|w|y))+$"}
TEXTS = {"type": "array", "items": TEXT}


def thing(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def things(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
SELECTOR = thing("matchLabels", matchLabels=LABELS | {"minProperties": 1})
NAMESPACES = thing(any={"const": True}, matchNames=things(TEXT)) | {"minProperties": 1, "maxProperties": 1}
RELABELINGS = things(thing("targetLabel", "replacement", targetLabel=TEXT, replacement=TEXT))
ENDPOINT = thing(
    "port",
    "interval",
    port=TEXT,
    path=TEXT,
    interval=DURATION,
    scrapeTimeout=DURATION,
    honorLabels={"type": "boolean"},
    relabelings=RELABELINGS,
)
MATCHER = thing("name", "matchType", name=TEXT, value={"type": "string"}, matchType={"enum": ["=", "!=", "=~", "!~"]})
SECRET_KEY = thing("name", "key", name=TEXT, key=TEXT)
RECEIVER = thing(
    "name",
    name=TEXT,
    pagerdutyConfigs=things(thing(routingKey=SECRET_KEY, sendResolved={"type": "boolean"})),
    webhookConfigs=things(thing(url=TEXT, urlSecret=SECRET_KEY, sendResolved={"type": "boolean"})),
) | {"minProperties": 2}
ROUTE = thing(
    "receiver",
    receiver=TEXT,
    groupBy=TEXTS,
    groupWait=DURATION,
    groupInterval=DURATION,
    repeatInterval=DURATION,
    matchers=things(MATCHER),
    muteTimeIntervals=TEXTS,
    activeTimeIntervals=TEXTS,
    routes=things({"$ref": "#/$defs/route"}),
    **{"continue": {"type": "boolean"}},
)
TIMES = things(thing("startTime", "endTime", startTime=TEXT, endTime=TEXT))
INTERVAL = thing(times=TIMES, weekdays=TEXTS, months=TEXTS, years=TEXTS)
RULE = thing(
    "expr",
    alert=TEXT,
    record=TEXT,
    expr=TEXT,
    labels=LABELS,
    annotations=LABELS,
    **{"for": DURATION, "keep_firing_for": DURATION},
) | {"oneOf": [{"required": ["alert"]}, {"required": ["record"]}]}
GROUP = thing(
    "name",
    "rules",
    name=TEXT,
    interval=DURATION,
    limit={"type": "integer"},
    labels=LABELS,
    query_offset=DURATION,
    rules=things(RULE),
)

SPECS = {
    ("monitoring.coreos.com/v1", "ServiceMonitor"): thing(
        "selector", "endpoints", selector=SELECTOR, namespaceSelector=NAMESPACES, endpoints=things(ENDPOINT)
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): thing(
        "selector",
        "podMetricsEndpoints",
        selector=SELECTOR,
        namespaceSelector=NAMESPACES,
        podMetricsEndpoints=things(ENDPOINT),
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): thing("groups", groups=things(GROUP)),
    ("monitoring.coreos.com/v1alpha1", "ScrapeConfig"): thing(
        "httpSDConfigs",
        httpSDConfigs=things(thing("url", url=TEXT, refreshInterval=DURATION)),
        metricsPath=TEXT,
        scrapeInterval=DURATION,
        scrapeTimeout=DURATION,
        honorLabels={"type": "boolean"},
        relabelings=RELABELINGS,
    ),
    ("monitoring.coreos.com/v1alpha1", "AlertmanagerConfig"): thing(
        "route",
        "receivers",
        route=ROUTE,
        receivers=things(RECEIVER),
        inhibitRules=things(
            thing("sourceMatch", "targetMatch", sourceMatch=things(MATCHER), targetMatch=things(MATCHER), equal=TEXTS)
        ),
        muteTimeIntervals=things(thing("name", "timeIntervals", name=TEXT, timeIntervals=things(INTERVAL))),
    ),
}


def known(document: dict[str, Any]) -> bool:
    return (document["apiVersion"], document["kind"]) in SPECS


def check(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError where the object is not of its kind's form."""
    spec = SPECS[document["apiVersion"], document["kind"]]
    metadata = thing("name", "namespace", "labels", name=TEXT, namespace=TEXT, labels=LABELS)
    whole = thing("spec", "metadata", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec)
    jsonschema.validate(document, whole | {"$defs": {"route": ROUTE}})
