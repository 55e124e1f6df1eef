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
    locate, kept, thing, number = library.optwatch_locate, library.optwatch_kept, ctypes.py_object, ctypes.c_int
    locate.argtypes, kept.argtypes = [thing, number, thing], [thing, thing, thing, number]
    locate.restype = kept.restype = thing
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
    matrix = torch.ones(2, 3)
    if [locate([x], 0, cpu)[5] for x in (matrix, matrix.t())] != [True, False]:
        return "the order of dimensions is told wrong"
    freed = torch.ones(4)
    freed.untyped_storage().resize_(0)
    for odd in (freed, torch.ones(3, dtype=torch.int64), matrix[:, ::2], torch.ones(3).to_sparse(), None):
        if locate([parameters[0], odd], 0, cpu) is not None:
            return f"{odd!r} is none to be read"
    moment = torch.zeros(3)
    state = {parameters[0]: {"moment": moment, "step": torch.tensor(7.0)}, parameters[1]: {}}
    if (values := kept(state, parameters, ("other", "moment"), 0)) is None or values[0] is not moment:
        return f"{values} instead of {[moment]} and nothing"
    if (values := kept(state, parameters, ("step",), 1)) != [7, None, None, None]:
        return f"{values} instead of 7 and nothing"
    return None if kept(state, parameters, ("step",), 0) is None else "a step count was taken for a moment"


if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    sys.exit(main(sys.argv[1]))
