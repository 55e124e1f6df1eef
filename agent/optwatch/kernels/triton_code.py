"""The two Triton kernels: a chunk of a tensor into three numbers, and those of all its chunks into the tensor's.

Whatever differs from call to call is read from a table in the device's memory. Triton makes another form of a kernel
for a number that is 1 or a multiple of 16, for one that needs 64 bits and for an address that is a multiple of 16; with
no number among the arguments, and none of the addresses looked at, the form that was made in the background is the one
that every call finds.

The table of ``n`` tensors, int64: `HEADER` numbers (n, columns of the result, elements of a chunk, number of chunks of
the tensors that have several, number of these tensors, which come first); n addresses x; n addresses y; n sizes; n
columns of the result; for each of those chunks ``tensor << 32 | chunk of the tensor``; for each of those tensors the
place of its first chunk among them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def added(first, second, third, x, y, inside, limit, kind: tl.constexpr, paired: tl.constexpr, limited: tl.constexpr):
    """A block's elements added to the sums of each lane, float64. Those outside are 0."""
    if kind == 1:
        first += x
        second = tl.where(x > second, x, second)  # a NaN is no larger, but it is in the sum
        if limited:
            third += tl.where(inside & (x < limit), 1.0, 0.0)
    elif kind == 2:
        first += (x - y) * (x - y)
        second += x * x
    else:
        first += x * x
        if paired:
            second += x * y
            third += y * y
    return first, second, third


@triton.jit(do_not_specialize=["table", "limits", "partial", "result"])
def chunks(
    table,
    limits,
    partial,
    result,
    kind: tl.constexpr,
    paired: tl.constexpr,
    limited: tl.constexpr,
    x_type: tl.constexpr,
    y_type: tl.constexpr,
    aligned: tl.constexpr,
    header: tl.constexpr,
    block: tl.constexpr,
):
    """One chunk of one tensor. A tensor of one chunk is finished; of others it leaves three numbers in ``partial``."""
    program = tl.program_id(0).to(tl.int64)
    tensors = tl.load(table)
    columns = tl.load(table + 1)
    chunk = tl.load(table + 2)
    cut = tl.load(table + 3)
    several = tl.load(table + 4)
    addresses = table + header
    whole_tensor = program >= cut
    piece = tl.load(addresses + 4 * tensors + program, mask=program < cut, other=0)
    owner = tl.where(whole_tensor, several + program - cut, piece >> 32)
    begin = tl.where(whole_tensor, 0, (piece & 0x7FFFFFFF) * chunk)
    length = tl.minimum(chunk, tl.load(addresses + 2 * tensors + owner) - begin)
    place = tl.load(addresses + 3 * tensors + owner)
    x_base = tl.load(addresses + owner).to(tl.pointer_type(x_type))
    y_base = x_base
    if paired:
        y_base = tl.load(addresses + tensors + owner).to(tl.pointer_type(y_type))
    if aligned:  # then 16 bytes are loaded at once: a chunk begins at a multiple of a block
        x_base = tl.multiple_of(x_base, 16)
        begin = tl.multiple_of(begin, 16)
        if paired:
            y_base = tl.multiple_of(y_base, 16)
    limit = 0.0
    if limited:
        limit = tl.load(limits + place)
    lanes = tl.arange(0, block)
    first = tl.zeros((block,), tl.float64)
    second = tl.zeros((block,), tl.float64)
    third = tl.zeros((block,), tl.float64)
    blocks = length // block * block
    everywhere = lanes >= 0
    for offset in range(0, blocks, block):
        x = tl.load(x_base + (begin + offset + lanes)).to(tl.float64)
        y = x
        if paired:
            y = tl.load(y_base + (begin + offset + lanes)).to(tl.float64)
        first, second, third = added(first, second, third, x, y, everywhere, limit, kind, paired, limited)
    at = blocks + lanes
    inside = at < length
    x = tl.load(x_base + (begin + at), mask=inside, other=0.0).to(tl.float64)
    y = x
    if paired:
        y = tl.load(y_base + (begin + at), mask=inside, other=0.0).to(tl.float64)
    first, second, third = added(first, second, third, x, y, inside, limit, kind, paired, limited)
    one = tl.sum(first)
    two = tl.where(one == one, tl.max(second), one) if kind == 1 else tl.sum(second)
    three = tl.sum(third)
    tl.store(partial + 3 * program, one, mask=program < cut)
    tl.store(partial + 3 * program + 1, two, mask=program < cut)
    tl.store(partial + 3 * program + 2, three, mask=program < cut)
    tl.store(result + place, one, mask=whole_tensor)
    tl.store(result + columns + place, two, mask=whole_tensor)
    tl.store(result + 2 * columns + place, three, mask=whole_tensor)


@triton.jit(do_not_specialize=["table", "partial", "result"])
def totals(table, partial, result, kind: tl.constexpr, header: tl.constexpr, block: tl.constexpr):
    """The numbers of the chunks of one tensor that has several into its column of the result."""
    tensor = tl.program_id(0).to(tl.int64)
    tensors = tl.load(table)
    columns = tl.load(table + 1)
    chunk = tl.load(table + 2)
    cut = tl.load(table + 3)
    addresses = table + header
    size = tl.load(addresses + 2 * tensors + tensor)
    place = tl.load(addresses + 3 * tensors + tensor)
    begin = tl.load(addresses + 4 * tensors + cut + tensor)
    count = (size + chunk - 1) // chunk
    lanes = tl.arange(0, block)
    first = tl.zeros((block,), tl.float64)
    second = tl.zeros((block,), tl.float64)
    third = tl.zeros((block,), tl.float64)
    for offset in range(0, count, block):
        at = offset + lanes
        inside = at < count
        row = partial + 3 * (begin + at)
        first += tl.load(row, mask=inside, other=0.0)
        other = tl.load(row + 1, mask=inside, other=0.0)
        if kind == 1:
            second = tl.where(other > second, other, second)
        else:
            second += other
        third += tl.load(row + 2, mask=inside, other=0.0)
    one = tl.sum(first)
    tl.store(result + place, one)
    if kind == 1:
        tl.store(result + columns + place, tl.where(one == one, tl.max(second), one))
    else:
        tl.store(result + columns + place, tl.sum(second))
    tl.store(result + 2 * columns + place, tl.sum(third))
