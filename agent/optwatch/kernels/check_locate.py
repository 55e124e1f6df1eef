"""Runs what locates tensors on some whose places are known. Run as a process of its own: it may end by a signal.

    check_locate.py LIBRARY FOLDER ...

The folders are those in which Python finds torch.
"""

from __future__ import annotations

import ctypes
import sys


def main(path: str) -> str | None:
    """What is wrong with the library, if anything is."""
    import torch

    library = ctypes.PyDLL(path)
    locate, moments, shared = library.optwatch_locate, library.optwatch_moments, library.optwatch_shared_count
    thing = ctypes.py_object
    locate.argtypes, moments.argtypes, shared.argtypes = [thing, ctypes.c_int, thing], [thing] * 4, [thing] * 3
    locate.restype = moments.restype = shared.restype = thing
    cpu = torch.device("cpu")
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    parameters = [torch.nn.Parameter(torch.ones(i + 3, dtype=dtype)[i:]) for i, dtype in enumerate(dtypes)]
    for parameter in parameters[1:]:
        parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in parameters[1:] if p.grad is not None]
    for wanted, tensors, positions in ((0, parameters, [0, 1, 2, 3]), (1, gradients, [1, 2, 3])):
        found = locate(parameters, wanted, cpu)
        if found is None or found[0] != len(tensors):
            return f"{found} of {len(tensors)} tensors"
        types = ctypes.c_uint64, ctypes.c_int64, ctypes.c_uint8, ctypes.c_int64
        told = [(kind * found[0]).from_address(at)[:] for kind, at in zip(types, found[1:5], strict=True)]
        right = [[x.data_ptr() for x in tensors], [3] * len(tensors), positions, positions]  # dtypes are in that order
        if told != right:
            return f"{told} instead of {right}"
    place = library.optwatch_place
    place.argtypes, place.restype = [thing], thing
    if (told := [place(x) for x in parameters]) != [(x.data_ptr(), 3, i) for i, x in enumerate(parameters)]:
        return f"{told} of single tensors"
    matrix = torch.ones(2, 3)
    if [locate([x], 0, cpu)[5] for x in (matrix, matrix.t())] != [True, False]:
        return "the order of dimensions is told wrong"
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    for odd in (freed, torch.ones(3, dtype=torch.int64), matrix[:, ::2], torch.ones(3).to_sparse(), None):
        if locate([parameters[0], odd], 0, cpu) is not None or place(odd) is not None:
            return f"{odd!r} is none to be read"
    moment, count = torch.zeros(3), torch.tensor(7.0)
    state = {parameters[0]: {"step": count}, parameters[1]: {"moment": moment, "step": count}}
    found = moments(state, parameters, ("other", "moment"), cpu)
    if found is None or (found[0], ctypes.c_uint64.from_address(found[1]).value) != (1, moment.data_ptr()):
        return f"{found} instead of one moment at {moment.data_ptr()}"
    if (position := ctypes.c_int64.from_address(found[4]).value) != 1:
        return f"the moment of parameter {position} instead of 1"
    if moments(state, parameters, ("step",), cpu) is not None:
        return "a step count was taken for a moment"
    if (counts := [shared(state, parameters[:n], ("step",)) for n in (2, 3)]) != [7, None]:
        return f"{counts} instead of 7 and nothing"
    return None


if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    sys.exit(main(sys.argv[1]))
