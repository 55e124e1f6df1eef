"""Callbacks for those who train through a framework and prefer one to the line `attach(optimizer)`.

Each module imports its framework, so none is imported before it is asked for. What they add to the one line: the run is
named as the framework names it, validation values are reported, and how training ended is told at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def reported(values: Mapping[str, Any], prefixes: tuple[str, ...]) -> dict[str, Any]:
    """The numbers among a framework's logged values whose names begin as one of ``prefixes``.

    What the agent measures itself (loss, gradient norm, learning rate) is left out that way: the framework's are means
    over many steps. Tensors with one element are handed on as they are: `Monitor.log` waits for no device.
    """
    return {
        name.replace("/", "_"): value
        for name, value in values.items()
        if name.startswith(prefixes)
        and not isinstance(value, (str, bool))
        and (isinstance(value, (int, float)) or getattr(value, "numel", lambda: 0)() == 1)
    }
