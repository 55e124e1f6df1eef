"""OpenSLO v1 as far as we use it: the form of alerts/slo/*.yaml, to which `slo` gives a meaning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Window = Literal["5m", "30m", "1h", "2h", "6h", "1d", "3d"]
Text = Annotated[str, Field(min_length=1, max_length=1050)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9.-]{0,62}$")]


class Part(BaseModel):
    """A part of a specification; what is not known is refused: a misspelt field would change nothing, silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Metadata(Part):
    """What an object is called; `annotations` hold what OpenSLO has no field for."""

    name: Name
    displayName: Text = ""  # noqa: N815 - OpenSLO's own names, here and below
    annotations: dict[str, str] = Field(default_factory=dict)


class Query(Part):
    """The query of a Prometheus source."""

    query: Text


class Source(Part):
    """Where a metric comes from: Prometheus alone."""

    type: Literal["Prometheus"]
    spec: Query


class Metric(Part):
    """One metric of a ratio."""

    metricSource: Source  # noqa: N815


class Ratio(Part):
    """Counters of the good or the bad events, and of all."""

    counter: Literal[True]
    good: Metric | None = None
    bad: Metric | None = None
    total: Metric


class IndicatorSpec(Part):
    """What is measured."""

    description: Text = ""
    ratioMetric: Ratio  # noqa: N815


class Indicator(Part):
    """An indicator, inline."""

    metadata: Metadata
    spec: IndicatorSpec


class TimeWindow(Part):
    """The window of an objective: 30 days, rolling, which is what the burn factors are made for."""

    duration: Literal["30d"]
    isRolling: Literal[True]  # noqa: N815


class Objective(Part):
    """The share of good events to reach."""

    displayName: Text = ""  # noqa: N815
    target: Annotated[float, Field(gt=0, lt=1)]


class BurnRate(Part):
    """How fast the budget burns, over the long window."""

    kind: Literal["burnrate"]
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    lookbackWindow: Window  # noqa: N815
    alertAfter: Literal["0m"]  # noqa: N815


class ConditionSpec(Part):
    """Whom a condition concerns."""

    severity: Literal["page", "ticket"]
    condition: BurnRate


class Condition(Part):
    """The one condition of a policy, inline."""

    kind: Literal["AlertCondition"]
    metadata: Metadata
    spec: ConditionSpec


class Target(Part):
    """Who is told."""

    targetRef: Literal["page", "ticket"]  # noqa: N815


class PolicySpec(Part):
    """When someone is told."""

    description: Text
    alertWhenBreaching: Literal[True]  # noqa: N815
    conditions: Annotated[list[Condition], Field(min_length=1, max_length=1)]
    notificationTargets: Annotated[list[Target], Field(min_length=1, max_length=1)]  # noqa: N815


class Policy(Part):
    """A policy, inline."""

    kind: Literal["AlertPolicy"]
    metadata: Metadata
    spec: PolicySpec


class Spec(Part):
    """What an SLO promises."""

    description: Text
    service: Name
    indicator: Indicator
    timeWindow: Annotated[list[TimeWindow], Field(min_length=1, max_length=1)]  # noqa: N815
    budgetingMethod: Literal["Occurrences"]  # noqa: N815
    objectives: Annotated[list[Objective], Field(min_length=1, max_length=1)]
    alertPolicies: list[Policy] = Field(default_factory=list)  # noqa: N815


class Document(Part):
    """One file: one SLO."""

    apiVersion: Literal["openslo/v1"]  # noqa: N815
    kind: Literal["SLO"]
    metadata: Metadata
    spec: Spec
