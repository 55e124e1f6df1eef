"""Runs a compiled kernel on numbers whose statistics are known. Run as a process of its own: it may end by a signal.

Not a test of the arithmetic, which has its own; it tells whether the library works on this processor at all.
"""

from __future__ import annotations

import ctypes
import sys
from array import array

COUNT = 100_003


def main(path: str) -> str | None:
    """What is wrong with the library, if anything is."""
    reduce = ctypes.CDLL(path).optwatch_reduce
    # 0, 1, 2 and 3 in turn, in every dtype of the kernel, in its order.
    floats = array("f", [float(i % 4) for i in range(COUNT)])
    bfloats = array("H", [(0x0000, 0x3F80, 0x4000, 0x4040)[i % 4] for i in range(COUNT)])
    halves = array("H", [(0x0000, 0x3C00, 0x4000, 0x4200)[i % 4] for i in range(COUNT)])
    doubles = array("d", floats)
    addresses = [floats.buffer_info()[0], bfloats.buffer_info()[0], halves.buffer_info()[0], doubles.buffer_info()[0]]
    pointers = array("Q", addresses)
    dtypes, sizes = bytes(range(4)), array("q", [COUNT] * 4)
    thresholds, out = array("d", [1.5] * 4), array("d", bytes(8 * 12))
    total, squares = sum(floats), sum(x * x for x in floats)
    below = sum(x < 1.5 for x in floats)
    for kind, others, want in (
        (0, pointers, [squares] * 3),
        (0, None, [squares, 0, 0]),
        (1, None, [total, 3, below]),
        (2, pointers, [0, squares, 0]),
    ):
        status = reduce(
            ctypes.c_int(kind),
            ctypes.c_int64(4),
            _address(pointers),
            dtypes,
            _address(others),
            dtypes,
            _address(sizes),
            _address(thresholds),
            _address(out),
            ctypes.c_int(1),
            None,
        )
        if status or list(out) != want * 4:
            return f"status {status}, {list(out)} instead of {want} four times"
    return None


def _address(numbers: array[int] | array[float] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0] if numbers is not None else None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
