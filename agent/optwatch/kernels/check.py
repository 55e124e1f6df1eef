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
    library = ctypes.CDLL(path)
    reduce, largest = library.optwatch_reduce, library.optwatch_largest
    # 0, 1, 2 and 3 in turn, in every dtype of the kernel, in its order.
    floats = array("f", [float(i % 4) for i in range(COUNT)])
    bfloats = array("H", [(0x0000, 0x3F80, 0x4000, 0x4040)[i % 4] for i in range(COUNT)])
    halves = array("H", [(0x0000, 0x3C00, 0x4000, 0x4200)[i % 4] for i in range(COUNT)])
    doubles = array("d", floats)
    addresses = [floats.buffer_info()[0], bfloats.buffer_info()[0], halves.buffer_info()[0], doubles.buffer_info()[0]]
    pointers = array("Q", addresses * 4)
    dtypes, sizes = bytes(range(4)), array("q", [COUNT] * 16)
    thresholds, out = array("d", [1.5] * 16), array("d", bytes(8 * 4 * 18))
    total, squares = sum(floats), sum(x * x for x in floats)
    below = sum(x < 1.5 for x in floats)
    want = [[squares] * 3, [squares, 0, 0], [total, 3, below], [0, squares, 0]]
    positions = array("q", [3, 0])
    # Four lists of four tensors: three numbers of each, and once more those of two of them.
    table, all_dtypes, start = array("q"), dtypes * 4, out.buffer_info()[0]
    for i, kind in enumerate((0, 0, 1, 2)):
        at = start + 8 * 18 * i
        table.extend((kind, 4, 3, at, 4, 2, positions.buffer_info()[0], at + 8 * 12, 2))
    others = array("Q", [*addresses, *[0] * 8, *addresses])
    status = reduce(
        _address(table),
        ctypes.c_int64(4),
        _address(pointers),
        all_dtypes,
        _address(others),
        all_dtypes,
        _address(sizes),
        _address(thresholds),
        ctypes.c_int(1),
        None,
    )
    right = [x for numbers in want for times in (4, 2) for x in numbers for _ in range(times)]
    wrong = [f"number {i} is {x} instead of {y}" for i, (x, y) in enumerate(zip(out, right, strict=True)) if x != y]
    if status or wrong:
        return f"status {status}: {', '.join(wrong[:8])}"
    largest.restype = ctypes.c_double
    for dtype, address in enumerate(addresses):
        found = largest(ctypes.c_uint64(address), ctypes.c_int64(COUNT), ctypes.c_uint8(dtype), ctypes.c_int(1), None)
        if found != 3:
            return f"the largest magnitude is {found} instead of 3"
    return None


def _address(numbers: array[int] | array[float]) -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
