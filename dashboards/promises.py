"""The first row of the executive dashboard: success and paging against their objectives."""

from __future__ import annotations

from dashboards.colours import BAD, CAUSES, GOOD, NEUTRAL, PLAIN, SPEED, STATUSES, WARN, WEIGHT
from dashboards.fleet import PROJECT
from dashboards.objectives import PAGE_SECONDS, PAGES, SUCCESS
from dashboards.panels import Query, Size, graph, limits, number
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model

_TILE, _THIRD = Size(3, 4), Size(8, 8)
_BUDGET = limits((0, WARN), (0.25, GOOD), base=BAD)
_SUCCEEDED, _FAILED = 'status="succeeded"', 'status=~"failed|lost"'
_SUCCESS, _PAGING = 'optwatch_slo="training-success"', 'optwatch_slo="time-to-page"'


def over(metric: str, window: str, matchers: str = "", by: str = "") -> str:
    """How much a counter of the server grew within `window`, in the chosen projects, in total or by one label.

    Replicas of the server all tell what the database knows: the most of them is the truth, and not their sum.
    """
    each = "project, cause" if metric == "optwatch_fleet_failures_total" else "project, status"
    grown = f"increase({metric}{{{PROJECT}{matchers and ', ' + matchers}}}[{window}])"
    return f"sum{by and f' by ({by})'} (max by ({each}) ({grown}))"


def _page_time(quantile: float, window: str) -> str:
    buckets = f"max by (path, le) (increase(optwatch_fleet_time_to_page_seconds_bucket[{window}]))"
    return f"histogram_quantile({quantile}, {buckets})"


def panels() -> list[Builder[model.Panel]]:
    """Eight numbers, and how they came to be."""
    ended, seconds = "optwatch_fleet_runs_ended_total", "optwatch_fleet_run_seconds_total"
    cost, device = "optwatch_fleet_cost_total", "optwatch_fleet_device_seconds_total"
    return [
        number(
            101,
            "Success, 30 days",
            f"Share of ended runs that succeeded, all projects. Good: {SUCCESS:.0%} or more, the objective.",
            Query(f"1 - max(slo:sli_error:ratio_rate30d{{{_SUCCESS}}})", "success"),
            unit="percentunit",
            thresholds=limits((SUCCESS, GOOD), base=BAD),
            size=_TILE,
            decimals=1,
            filled=True,
            no_value="not known",
        ),
        number(
            102,
            "Error budget left",
            "Share of the failures that the objective allows in 30 days and that have not happened. Good: above 25%. "
            "Below 0 the objective is missed: make runs safer before making more of them.",
            Query(f"max(slo:error_budget:ratio{{{_SUCCESS}}})", "left"),
            unit="percentunit",
            thresholds=_BUDGET,
            size=_TILE,
            decimals=0,
            filled=True,
            no_value="not known",
        ),
        number(
            103,
            "Time to page, 99%",
            "From an event to its page, on the slower path, over the range shown. Good: below the objective of "
            f"{PAGE_SECONDS:.0f} s, which {PAGES:.0%} of pages are to keep.",
            Query(f"max({_page_time(0.99, '$__range')})", "p99"),
            unit="s",
            thresholds=limits((PAGE_SECONDS, BAD)),
            size=_TILE,
            decimals=1,
            no_value="no page",
        ),
        number(
            104,
            "Runs ended",
            "Within the range shown. Good: as many as were planned.",
            Query(over(ended, "$__range"), "runs"),
            unit="locale",
            thresholds=limits(base=PLAIN),
            size=_TILE,
            decimals=0,
        ),
        number(
            105,
            "Average duration",
            "Of runs that ended within the range shown. Good: what was planned; compare with the trend below.",
            Query(f"{over(seconds, '$__range')} / {over(ended, '$__range')}", "duration"),
            unit="s",
            thresholds=limits(base=PLAIN),
            size=_TILE,
            decimals=1,
        ),
        number(
            106,
            "Cost",
            "Of runs that ended within the range shown, in the currency of cost_per_device_hour. Good: within the "
            "month's budget.",
            Query(over(cost, "$__range"), "cost"),
            unit="short",
            thresholds=limits(base=PLAIN),
            size=_TILE,
            decimals=1,
            no_value="no rate set",
        ),
        number(
            107,
            "Cost of a success",
            "All cost, failures included, over runs that succeeded. Good: falls from month to month.",
            Query(f"{over(cost, '$__range')} / {over(ended, '$__range', _SUCCEEDED)}", "cost"),
            unit="short",
            thresholds=limits(base=PLAIN),
            size=_TILE,
            decimals=1,
            no_value="no rate set",
        ),
        number(
            108,
            "Device time lost",
            "Share of device time that went into runs that failed or were lost. Good: below 5%.",
            Query(
                f"{over(device, '$__range', _FAILED)} / {over(device, '$__range')}",
                "lost",
            ),
            unit="percentunit",
            thresholds=limits((0.05, WARN), (0.1, BAD)),
            size=_TILE,
            decimals=1,
        ),
        graph(
            110,
            "Success rate against its objective",
            f"All projects. Good: the 30 days above the dashed red line at {SUCCESS:.0%}. The thin days show when "
            "it was lost.",
            Query(f"1 - max(slo:sli_error:ratio_rate30d{{{_SUCCESS}}})", "30 days"),
            Query(f"1 - max(slo:sli_error:ratio_rate3d{{{_SUCCESS}}})", "3 days"),
            unit="percentunit",
            colour=WEIGHT,
            fixed={"30 days": GOOD, "3 days": NEUTRAL.tones[2]},
            size=_THIRD,
            limit=SUCCESS,
            floor=2 * SUCCESS - 1,
            reach=1,
            dashed="^3 days$",
            no_value="x",
        ),
        graph(
            111,
            "Error budget left",
            "Good: above 0, the dashed red line. It comes back as failures grow older than 30 days.",
            Query(f"max(slo:error_budget:ratio{{{_SUCCESS}}})", "training success"),
            Query(f"max(slo:error_budget:ratio{{{_PAGING}}})", "time to page"),
            unit="percentunit",
            colour=WEIGHT,
            fixed={"training success": GOOD, "time to page": SPEED.main},
            size=_THIRD,
            limit=0,
            floor=-0.1,
            reach=1,
            no_value="x",
        ),
        graph(
            112,
            "Time to page, a day",
            "From an event to its page, median and dashed 99%: direct by the server, and through Prometheus. Good: "
            f"the 99% below the red line at {PAGE_SECONDS:.0f} s.",
            Query(_page_time(0.5, "1d"), "{{path}} p50"),
            Query(_page_time(0.99, "1d"), "{{path}} p99"),
            unit="s",
            colour=SPEED,
            fixed={
                "direct p50": SPEED.tones[1],
                "direct p99": SPEED.tones[1],
                "prometheus p50": SPEED.tones[2],
                "prometheus p99": SPEED.tones[2],
            },
            size=_THIRD,
            limit=PAGE_SECONDS,
            minimum=0,
            reach=PAGE_SECONDS * 1.2,
            dashed="p99$",
            daily=True,
            no_value="No page was sent",
        ),
        graph(
            113,
            "Runs ended, a day",
            "Good: green, and as many as were planned.",
            Query(over(ended, "1d", by="status"), "{{status}}"),
            unit="locale",
            colour=NEUTRAL,
            fixed=STATUSES,
            size=_THIRD,
            stacked=True,
            minimum=0,
            daily=True,
            bars=True,
            no_value="No run ended",
        ),
        graph(
            114,
            "Average duration, a day",
            "Of runs that succeeded, and dashed of those that failed: late failures cost most. Good: level.",
            Query(
                f"{over(seconds, '1d', _SUCCEEDED)} / ({over(ended, '1d', _SUCCEEDED)} > 0)",
                "succeeded",
            ),
            Query(
                f"{over(seconds, '1d', _FAILED)} / ({over(ended, '1d', _FAILED)} > 0)",
                "failed",
            ),
            unit="s",
            colour=SPEED,
            fixed=STATUSES,
            size=_THIRD,
            minimum=0,
            daily=True,
            dashed="^failed$",
            no_value="No run ended",
        ),
        graph(
            115,
            "Failures a day, by cause",
            "Good: none. One cause that keeps coming back is worth a person's week. Green are lost runs that were "
            "heard of again.",
            Query(over("optwatch_fleet_failures_total", "1d", by="cause") + " > 0", "{{cause}}"),
            Query(
                f"sum(max by (project) (increase(optwatch_fleet_runs_recovered_total{{{PROJECT}}}[1d]))) > 0",
                "came back",
            ),
            unit="locale",
            colour=NEUTRAL,
            fixed={**CAUSES, "came back": GOOD},
            size=_THIRD,
            stacked=True,
            minimum=0,
            decimals=0,
            daily=True,
            bars=True,
            no_value="No run failed",
        ),
    ]
