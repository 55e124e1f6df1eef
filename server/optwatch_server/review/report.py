"""The weekly review as people get it: `optwatch review`, the page /review, and Markdown, HTML and JSON of both."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from optwatch_server import wire
from optwatch_server.database.engine import ENVIRONMENT, Database, default_url
from optwatch_server.objectives import slo
from optwatch_server.runs.lives import Use
from optwatch_server.settings import Settings
from optwatch_server.shipped import shipped
from optwatch_server.web.numbers import flat, shown
from optwatch_server.web.pages import Pages, iso, utc
from optwatch_server.web.problems import Problem

from .figures import OUTCOMES, PAGE_SECONDS, Review, review
from .weeks import Week, parse_week, week_of

FORMATS = ("markdown", "json", "html")
LISTED = 20
"""Failed runs that Markdown and HTML list; JSON has all."""


def hours(seconds: int) -> str:
    """Return seconds as ``h:mm:ss``, which unlike decimal hours adds up exactly as shown."""
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def money(cents: int) -> str:
    """Return cents as ``12.34``."""
    return f"{cents // 100}.{cents % 100:02}"


def cost(use: Use) -> str:
    """Return what a use cost, or a dash where no run of it has a rate."""
    return "–" if use.device_seconds and use.unpriced_device_seconds == use.device_seconds else money(use.cost_cents)


def percent(ratio: float | None) -> str:
    """Return a ratio as ``97.5%``; 100% is only said of 1, and None is a dash."""
    if ratio is None:
        return "–"
    text = f"{100 * ratio:.1f}"
    return "99.9%" if text == "100.0" and ratio < 1 else f"{text}%".replace(".0%", "%")


def seconds(value: float | None) -> str:
    """Return a duration in seconds to a tenth, or a dash."""
    return "–" if value is None else f"{value:.1f} s"


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{letter}" if letter in "\\`*_[]|#~" else letter for letter in line)


_SHOWN: dict[str, Any] = {
    "hours": hours,
    "cost": cost,
    "percent": percent,
    "seconds": seconds,
    "outcomes": OUTCOMES,
    "page_seconds": PAGE_SECONDS,
    "listed": LISTED,
}


def target(folder: Path | None = None) -> Decimal:
    """Return the objective training-success of the shipped specifications.

    Raises:
        ValueError: they do not define it, or cannot be read.
    """
    folder = shipped("alerts") / "slo" if folder is None else folder
    for objective in slo.load(folder):
        if objective.name == "training-success":
            return objective.target
    raise ValueError(f"{folder} defines no objective training-success: the review is about it")


def render(found: Review, form: str, *, public_url: str, now: float) -> str:
    """Return a review as ``markdown``, ``json`` or ``html``; the same arguments give the same text.

    `public_url` begins the links, and `now` (Unix seconds) is what the HTML page says it is as of.
    """
    if form == "json":
        return json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n"
    # Markdown has an escaping of its own: the filter `escaped`, on everything that a user supplies.
    environment = Environment(
        loader=PackageLoader("optwatch_server"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(shown=shown, flat=flat, utc=utc, iso=iso, escaped=escaped)
    template = environment.get_template("review.md" if form == "markdown" else "review.html")
    text = template.render(**_values(found), base=public_url, now=now)
    # The page's links begin at the server's root: in a file they need the server's address in front.
    text = text.replace('href="/', f'href="{public_url}/') if form == "html" else text
    return text.rstrip("\n") + "\n"


def _values(found: Review) -> dict[str, Any]:
    week = Week(found.begin)
    project = "" if found.project is None else f"?{urlencode({'project': found.project})}"
    return {
        **_SHOWN,
        "review": found,
        "week_end": week.end - 1,
        "before": str(week.before(1)),
        "after": str(week.before(-1)),
        "of_project": project,
    }


def review_routes(pages: Pages) -> APIRouter:
    """Return the routes of the review's pages; without a week it is the last complete one."""
    router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)
    service = pages.service

    def answer(week: str | None, project: str, form: str) -> Response:
        now = service.clock()
        try:
            chosen = week_of(now).before(1) if week is None else parse_week(week, now)
        except ValueError as error:
            raise Problem(404, str(error)) from error
        rate = service.settings.cost_per_device_hour
        with service.database.read() as session:
            found = review(session, chosen, now, target=target(), default_rate=rate, project=project or None)
        if form in ("markdown", "json"):
            text = render(found, form, public_url=service.settings.public_url, now=now)
            return PlainTextResponse(text, media_type={"json": "application/json"}.get(form, "text/markdown"))
        if form != "html":
            raise Problem(422, f"format is {form!r}: choose one of {', '.join(FORMATS)}")
        return pages.render("review.html", **_values(found))

    @router.get("/review")
    def last(project: wire.Label = "", form: Annotated[str, Query(alias="format", max_length=16)] = "html") -> Response:
        return answer(None, project, form)

    @router.get("/review/{week}")
    def of_week(
        week: str, project: wire.Label = "", form: Annotated[str, Query(alias="format", max_length=16)] = "html"
    ) -> Response:
        return answer(week, project, form)

    return router


def main(arguments: Sequence[str], clock: Callable[[], float] = time.time) -> int:
    """Print a review; return 0, or 1 with one line on standard error where there is none. `clock`: Unix seconds."""
    parser = argparse.ArgumentParser(
        prog="optwatch review", description="How a week of training went: success, budget, hours lost and their causes."
    )
    parser.add_argument("--week", metavar="2026-W47", help="ISO week, in UTC (default: the last complete one)")
    parser.add_argument("--project", help="only this project (default: all)")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="(default: %(default)s)")
    parser.add_argument("--database-url", help=f"the server's database (default: ${ENVIRONMENT}, else the user's own)")
    parser.add_argument("--public-url", help="begin of links to the server (default: $OPTWATCH_PUBLIC_URL)")
    options = parser.parse_args(arguments)
    now = clock()
    try:
        settings = Settings.read(public_url=options.public_url)
        week = week_of(now).before(1) if options.week is None else parse_week(options.week, now)
        text = _read(options.database_url or default_url(), week, now, settings, options.project, options.format)
    except (ValueError, OSError) as error:
        print(f"optwatch review: {error}", file=sys.stderr)
        return 1
    sys.stdout.write(text)
    return 0


def _read(url: str, week: Week, now: float, settings: Settings, project: str | None, form: str) -> str:
    where = f"check --database-url or ${ENVIRONMENT}"
    database = Database(url)
    try:
        if database.is_sqlite and not Path(str(database.url.database)).is_file():
            raise ValueError(f"there is no database at {database.url.database}: {where}")
        with database.read() as session:
            rate = settings.cost_per_device_hour
            found = review(session, week, now, target=target(), default_rate=rate, project=project)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise ValueError(
            f"the database {database.shown} cannot be read ({reason}): {where}, and start `optwatch server` of this "
            "version on it once, which migrates it"
        ) from error
    finally:
        database.close()
    return render(found, form, public_url=settings.public_url, now=now)
