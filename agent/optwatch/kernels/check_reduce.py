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
    addresses = array("Q", [x.buffer_info()[0] for x in (floats, bfloats, halves, doubles)])
    dtypes, sizes = array("B", range(4)), array("q", [COUNT] * 4)
    thresholds, out = array("d", [1.5] * 4), array("d", bytes(8 * 4 * 24))
    total, squares = sum(floats), sum(x * x for x in floats)
    below = sum(x < 1.5 for x in floats)
    # Four lists of four tensors: three numbers of each, and once more those of the pairs, the last with the first.
    wanted = ((0, 4, [squares] * 3), (0, 0, [squares, 0, 0]), (1, 0, [total, 3, below]), (2, 4, [0, squares, 0]))
    positions, table = array("q", [3, 2, 1, 0]), array("q")
    where, many, codes, right = _start(addresses), _start(sizes), _start(dtypes), array("d")
    for i, (kind, paired, numbers) in enumerate(wanted):
        at = _start(out) + 8 * 24 * i
        table.extend((kind, 4, where, many, codes, _start(thresholds)))
        table.extend((paired, where, many, codes, _start(positions), 3, at, 4, 3, at + 8 * 12, 4))
        right.extend(number for times in (4, 4) for number in numbers for _ in range(times))
        if not paired:
            right[-12:] = array("d", bytes(8 * 12))
    status = reduce(ctypes.c_void_p(_start(table)), ctypes.c_int64(4), ctypes.c_int(1), None)
    wrong = [f"number {i} is {x} instead of {y}" for i, (x, y) in enumerate(zip(out, right, strict=True)) if x != y]
    if status or wrong:
        return f"status {status}: {', '.join(wrong[:8])}"
    copied = array("d", bytes(8 * COUNT))
    target, first = array("Q", [_start(copied)]), array("q", [0])
    last = where + 24, many, codes + 3
    table = array("q", (3, 1, *last, 0, 1, _start(target), *last[1:], _start(first), *[0] * 6))
    status = reduce(ctypes.c_void_p(_start(table)), ctypes.c_int64(1), ctypes.c_int(1), None)
    if status or copied != doubles:
        return f"status {status} of a copy, which is another"
    largest.restype = ctypes.c_double
    for dtype, address in enumerate(addresses):
        found = largest(ctypes.c_uint64(address), ctypes.c_int64(COUNT), ctypes.c_uint8(dtype), ctypes.c_int(1), None)
        if found != 3:
            return f"the largest magnitude is {found} instead of 3"
    return None


def _start(numbers: array[int] | array[float]) -> int:
    return numbers.buffer_info()[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
