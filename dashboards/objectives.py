"""Objectives that dashboards draw as limits: read from alerts/slo/, where each is written once and pages come from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_SPECIFICATIONS = Path(__file__).resolve().parent.parent / "alerts" / "slo"


def _specification(name: str) -> tuple[str, Any]:
    text = (_SPECIFICATIONS / f"{name}.yaml").read_text(encoding="utf-8")
    return text, yaml.safe_load(text)["spec"]


def _page_seconds(text: str) -> float:
    # The objective counts a bucket of the histogram, and the bucket's bound is the limit.
    bounds = set(re.findall(r'optwatch_fleet_time_to_page_seconds_bucket{le=~?"([0-9]+)', text))
    if len(bounds) != 1:
        raise ValueError(f"alerts/slo/time-to-page.yaml counts buckets up to {sorted(bounds)}: expected one bound")
    return float(bounds.pop())


SUCCESS: float = _specification("training-success")[1]["objectives"][0]["target"]
"""Share of the runs that succeeded, failed or were lost within 30 days that is to succeed."""
PAGE_SECONDS = _page_seconds(_specification("time-to-page")[0])
"""Time from an event to its page, in seconds, that most pages are to keep."""
PAGES: float = _specification("time-to-page")[1]["objectives"][0]["target"]
"""Share of pages that are to keep it."""
