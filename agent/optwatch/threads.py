"""How a thread of ours computes: alone.

An operation of torch's that is large enough, or one of MKL's from 150 numbers on if not before, is shared out to
threads, and OpenMP keeps a pool of these for each thread that asks. With a second pool there are more threads than
cores; then those of training stop waiting for each other actively and are put to sleep after each operation instead.
Training of many small operations took 3.4 times as long.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch


def compute_alone() -> None:
    """From now on the calling thread starts no threads for operations on the CPU. Other threads go on as they do.

    ``torch.set_num_threads`` would not do: it is for all threads of the process.
    """
    torch.get_num_threads()  # makes torch set up this thread, which it would else do later and undo this
    for path, name in ((None, "omp_set_num_threads"), (_library(), "MKL_Set_Num_Threads_Local")):
        try:
            getattr(ctypes.CDLL(path), name)(1)
        except (OSError, AttributeError, TypeError):  # built without it; Windows finds no library without a name
            continue


def _library() -> str:
    """The library of torch that holds MKL, where there is one. It is loaded already."""
    ending = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return str(Path(torch.__path__[0]) / "lib" / f"{'' if ending == 'dll' else 'lib'}torch_cpu.{ending}")
