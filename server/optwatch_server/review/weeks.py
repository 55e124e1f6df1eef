"""ISO weeks in UTC: Monday 00:00 to the next Monday 00:00, written as ``2026-W47``."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

SECONDS = 7 * 86_400


@dataclass(frozen=True, slots=True, order=True)
class Week:
    """One ISO week. `begin` and `end` are whole Unix seconds; the end belongs to the next week."""

    begin: int

    @property
    def end(self) -> int:
        """The first second of the next week."""
        return self.begin + SECONDS

    def before(self, weeks: int) -> Week:
        """Return the week that many weeks before this one, or after it where the number is negative."""
        return Week(self.begin - weeks * SECONDS)

    def __str__(self) -> str:
        year, number, _ = datetime.datetime.fromtimestamp(self.begin, datetime.timezone.utc).isocalendar()
        return f"{year}-W{number:02}"


def week_of(timestamp: float) -> Week:
    """Return the week that a moment (Unix seconds) is in."""
    moment = datetime.datetime.fromtimestamp(int(timestamp), datetime.timezone.utc)
    monday = moment.replace(hour=0, minute=0, second=0) - datetime.timedelta(days=moment.weekday())
    return Week(int(monday.timestamp()))


def parse_week(text: str, now: float) -> Week:
    """Return the week that `text` names.

    Raises:
        ValueError: it names none, or one that has not begun by `now` (Unix seconds).
    """
    found = re.fullmatch(r"([0-9]{4})-W([0-9]{2})", text)
    try:
        monday = datetime.date.fromisocalendar(int(found[1]), int(found[2]), 1) if found else None
    except ValueError:
        monday = None
    this = week_of(now)
    if monday is None or monday.year < 1970:
        raise ValueError(f"week {text[:40]!r} does not exist: give an ISO week from 1970 on, such as {this.before(1)}")
    week = Week(int(datetime.datetime(monday.year, monday.month, monday.day, tzinfo=datetime.timezone.utc).timestamp()))
    if week > this:
        raise ValueError(f"week {week} has not begun: the newest is {this}, and the last complete one {this.before(1)}")
    return week
