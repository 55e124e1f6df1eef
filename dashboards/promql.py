"""Reads the names out of PromQL: series, their matchers, and labels that an expression groups or joins by.

It tokenizes and does not parse: whether an expression is valid is for Prometheus to say.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<range>\[[^\]]*\])
      | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
      | (?P<number>[0-9][0-9a-zA-Z.]*)
      | (?P<mark>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){},@$])
      | (?P<space>\s+)""",
    re.VERBOSE,
)
_GROUPING = frozenset({"by", "without", "on", "ignoring", "group_left", "group_right"})
_WORDS = _GROUPING | {"and", "or", "unless", "offset", "bool", "start", "end"}
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?")


def tokens(expr: str) -> list[tuple[str, str]]:
    """Kind and text of each token, without white space.

    Raises:
        ValueError: the expression holds a character that PromQL has no use for; the message shows where.
    """
    found, at = [], 0
    while at < len(expr):
        match = _VARIABLE.match(expr, at) or _TOKEN.match(expr, at)
        if match is None:
            raise ValueError(f"PromQL cannot hold {expr[at]!r} at {at} of {expr!r}")
        kind = match.lastgroup or "number"  # a Grafana variable outside a string stands for a number or a duration
        if kind != "space":
            found.append((kind, match.group()))
        at = match.end()
    return found


def selectors(expr: str) -> Iterator[tuple[str, set[str]]]:
    """Name and matched labels of every series selector, in order."""
    listed = tokens(expr)
    skip = 0
    for index, (kind, text) in enumerate(listed):
        following = listed[index + 1][1] if index + 1 < len(listed) else ""
        if index < skip or kind != "name" or text in _WORDS:
            if kind == "name" and text in _GROUPING and index >= skip and following == "(":
                skip = _closing(listed, index + 1, ")")
            continue
        if following == "(":
            continue  # a function or an aggregation
        if following == "{":
            skip = _closing(listed, index + 1, "}")
            inside = listed[index + 2 : skip]
            yield text, {word for kind, word in inside if kind == "name"}
        elif following not in ("by", "without"):
            yield text, set()


def labels_used(expr: str) -> set[str]:
    """Labels that the expression groups by or joins on; those inside label_replace are strings and not seen."""
    listed = tokens(expr)
    used: set[str] = set()
    for index, (kind, text) in enumerate(listed):
        if kind == "name" and text in _GROUPING and index + 1 < len(listed) and listed[index + 1][1] == "(":
            used |= {word for kind, word in listed[index + 2 : _closing(listed, index + 1, ")")] if kind == "name"}
    return used


def _closing(listed: list[tuple[str, str]], opening: int, mark: str) -> int:
    return next((index for index in range(opening, len(listed)) if listed[index][1] == mark), len(listed))
