"""Compiles every form of the CUDA kernels to machine code, without a GPU, and prints what is not as it should be.

    python tests/agent/kernels/kernels_compile.py aligned|unaligned COMPUTE_CAPABILITY ...

By itself a process: Triton warns at import, and keeps what it compiles in $TRITON_CACHE_DIR.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from optwatch.kernels.cuts import BLOCK, HEADER
from optwatch.kernels.triton_code import chunks, totals
from optwatch.kernels.triton_reduce import KINDS, POINTED

ARGUMENTS = {"table": "*i64", "limits": "*fp64", "partial": "*fp64", "result": "*fp64"}


def forms(aligned: bool) -> Iterator[dict[str, Any]]:
    for kind, x, y in itertools.product(KINDS, POINTED, (None, *POINTED)):
        if (kind == "nonnegative" and y) or (kind == "changes" and y is not x):
            continue
        for limited in (False, True) if kind == "nonnegative" else (False,):
            types = {"x_type": POINTED[x], "y_type": POINTED[y or x]}
            flags = {"paired": y is not None, "limited": limited, "aligned": aligned}
            yield {"kind": KINDS[kind], **flags, **types, "header": HEADER, "block": BLOCK}


def compiled(kernel: Any, constants: dict[str, Any], capability: int) -> str:
    """Its PTX, once it has become machine code as well."""
    names = [name for name in ARGUMENTS if name in kernel.arg_names]
    signature = {name: ARGUMENTS[name] for name in names} | dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"]
    return str(made.asm["ptx"])


def looked_at(kernel: Any, capability: int) -> set[str]:
    """What Triton makes of the addresses of its arguments: one thing where all addresses are the same to it."""
    binder = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", capability, 32))
    )
    constants = {parameter.name: 1 for parameter in kernel.params if parameter.is_constexpr}
    seen = set()
    for shift in (0, 1):
        held = {"*i64": torch.zeros(9, dtype=torch.int64), "*fp64": torch.zeros(9, dtype=torch.float64)}
        given = {n: held[ARGUMENTS[n]][shift:] for n in kernel.arg_names if n in ARGUMENTS}
        assert all(x.data_ptr() % 16 == 8 * shift for x in given.values())
        seen.add(str(binder(**given, **constants)[1]))
    return seen


def main() -> None:
    wrong = 0
    for capability in map(int, sys.argv[2:]):
        for kernel in (chunks, totals):
            if len(seen := looked_at(kernel, capability)) != 1:
                wrong += 1
                print("compiled again for other addresses:", seen)
        for form in forms(sys.argv[1] == "aligned"):
            loads = re.findall(r"ld\.global\.(v\d+)", compiled(chunks, form, capability))
            if bool(loads) != form["aligned"]:
                wrong += 1
                print(capability, form, loads)
        for kind in KINDS.values():
            compiled(totals, {"kind": kind, "header": HEADER, "block": 128}, capability)
    print(f"{wrong} wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
