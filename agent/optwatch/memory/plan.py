"""`optwatch plan`: what a run will need before any GPU is asked for."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from .families import ALTERNATIVES, FAMILIES, ITEM_BYTES, Need, state_bytes

SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
SIZES = {"": 1.0, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
WIDTH = 4096
"""Side of the matrices that the parameters are taken to be, where the size of the state depends on shapes."""
WAYS = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "fsdp": "FSDP"}


def need(family: str, parameters: float, dtype: str, masters: bool, width: int = WIDTH) -> Need:
    """Bytes of weights, gradients, masters and state of `parameters` parameters, taken as square matrices.

    With `masters` the optimizer works on float32 copies of the weights and its state is float32 too (Micikevicius et
    al. 2018, "Mixed Precision Training"); without, its state has the type of the weights.
    """
    item = ITEM_BYTES[dtype]
    state = state_bytes(family, [((width, width), 1)], 4 if masters else item) / width**2 * parameters
    return Need(item * parameters, item * parameters, 4 * parameters if masters else 0.0, state)


def table(
    family: str, parameters: float, dtype: str, masters: bool, world: int, width: int = WIDTH
) -> dict[str, dict[str, Any]]:
    """The family asked for, then the alternatives: bytes of each part, and of a rank by way of sharding."""
    rows = {}
    for name in dict.fromkeys((family, *ALTERNATIVES)):
        needed = need(name, parameters, dtype, masters, width)
        rows[name] = {
            "title": FAMILIES[name].title,
            "note": FAMILIES[name].note,
            "weights": needed.weights,
            "gradients": needed.gradients,
            "masters": needed.masters,
            "state": needed.state,
            "total": needed.total,
            "per_rank": needed.per_rank(world),
        }
    return rows


def main(arguments: list[str]) -> int:
    """Print the table for the command line; 2 where that makes no sense."""
    parser = argparse.ArgumentParser(
        prog="optwatch plan",
        description="Memory that training holds all the time: weights, gradients, float32 masters and optimizer state. "
        "Activations and buffers come on top.",
    )
    parser.add_argument("--params", required=True, help="number of parameters, such as 7e9 or 7B")
    parser.add_argument("--dtype", default="bf16", help=f"of weights and gradients: {', '.join(ITEM_BYTES)}")
    parser.add_argument("--optimizer", default="adamw", help=", ".join(FAMILIES))
    parser.add_argument("--world", default="1", help="ranks that may share the memory")
    parser.add_argument("--memory", help="what a rank has, such as 80GB or 79GiB: tells what fits")
    parser.add_argument("--no-masters", action="store_true", help="16-bit weights without float32 copies of them")
    parser.add_argument("--width", default=str(WIDTH), help="side of the matrices; matters to Adafactor and SOAP")
    parser.add_argument("--json", action="store_true", help="bytes, as JSON")
    given = parser.parse_args(arguments)
    try:
        parameters = _amount("--params", given.params, SUFFIXES, "7e9 or 7B")
        memory = _amount("--memory", given.memory, SIZES, "80GB or 79GiB") if given.memory else None
        world, width = _count("--world", given.world), _count("--width", given.width)
        family = _known("--optimizer", given.optimizer.lower().replace("_", "-"), FAMILIES)
        dtype = _known("--dtype", given.dtype, {**ITEM_BYTES, **_LONG})
    except ValueError as error:
        print(f"optwatch plan: {error}", file=sys.stderr)
        return 2
    dtype = _LONG.get(dtype, dtype)
    masters = ITEM_BYTES[dtype] < 4 and not given.no_masters
    rows = table(family, parameters, dtype, masters, world, width)
    asked = {"parameters": parameters, "dtype": dtype, "masters": masters, "world": world, "width": width}
    if given.json:
        document = {**asked, "optimizer": family, "memory": memory, "families": rows}
        if memory is not None:
            for row in rows.values():
                row["fits"] = {way: size <= memory for way, size in row["per_rank"].items()}
        print(json.dumps(document, indent=2))
    else:
        print(_text(rows, parameters, dtype, masters, world, memory))
    return 0


_LONG = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _text(
    rows: dict[str, dict[str, Any]], parameters: float, dtype: str, masters: bool, world: int, memory: float | None
) -> str:
    ways = list(WAYS) if world > 1 else ["ddp"]
    heads = ["optimizer", "weights", "gradients", "masters", "state", *(WAYS[way] for way in ways if world > 1)]
    heads += ["total"] if world == 1 else []
    lines = [heads]
    for row in rows.values():
        parts = [_gib(row[part]) for part in ("weights", "gradients", "masters", "state")]
        lines.append([row["title"], *parts, *(_fitting(row["per_rank"][way], memory) for way in ways)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    shown = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells)).rstrip()
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    kept = "with float32 masters" if masters else "without masters"
    head = f"{parameters:.4g} parameters in {dtype}, {kept}; GiB"
    if world > 1:
        head += f", whole and for each of {world} ranks by way of sharding"
    if memory is not None:
        head += f"; * fits into {_gib(memory)}"
    foot = "Activations, buffers and, with FSDP, the layer at work come on top."
    notes = [f"{row['title']}: {row['note']}." for row in rows.values() if row["note"]]
    return "\n".join([head, "", *shown, "", foot, *notes])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _fitting(size: float, memory: float | None) -> str:
    if memory is None:
        return _gib(size)
    return f"{_gib(size)}{'*' if size <= memory else ' '}"


def _amount(option: str, text: str, units: dict[str, float], example: str) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    try:
        amount = float(match[1]) * units[match[2].upper()] if match else 0.0
    except (KeyError, ValueError):
        amount = 0.0
    if not 0 < amount < 1e18:
        raise ValueError(f"{option} {text!r}: give a number above 0, such as {example}")
    return amount


def _count(option: str, text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10**6:
        raise ValueError(f"{option} {text!r}: give a whole number from 1 to 1000000")
    return int(text)


def _known(option: str, text: str, known: Any) -> str:
    if text not in known:
        raise ValueError(f"{option} {text!r} is not known; give one of {', '.join(known)}")
    return text
