"""Numbers and text as JSON can carry them: what is not finite travels as a string, and no string breaks a database."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue

NonFinite = Literal["NaN", "Infinity", "-Infinity"]
_MAX_DEPTH = 32


def _refuse_bare_nan(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError('a number that is not finite is not JSON: send the string "NaN", "Infinity" or "-Infinity"')
    return value


Number = Annotated[
    Annotated[float, Field(strict=True, allow_inf_nan=False)] | NonFinite, BeforeValidator(_refuse_bare_nan)
]
"""A number of the wire: finite, or one of three strings."""


def encode(number: float) -> float | NonFinite:
    """Return `number` as the wire carries it."""
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def clean_text(value: object) -> object:
    """Replace what PostgreSQL cannot store in text (NUL, half of a surrogate pair) by U+FFFD; leave non-text alone."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
    return value


def clean_json(value: object, depth: int = 0) -> object:
    """Return a JSON value with clean text and encoded numbers all the way down.

    Raises:
        ValueError: it is nested deeper than 32 levels.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH} levels: flatten it")
    if isinstance(value, dict):
        return {clean_text(key): clean_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [clean_json(item, depth + 1) for item in value]
    if isinstance(value, float):
        return encode(value)
    return clean_text(value)


def flat(mapping: Mapping[str, JsonValue], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Give the leaves of nested objects, sorted, each under its path: ``AdamW.lr``."""
    for name, value in sorted(mapping.items()):
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def shown(value: JsonValue | float) -> str:
    """Return a value as a person reads it: four significant digits, no sign of how it was stored."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value, ensure_ascii=False)
