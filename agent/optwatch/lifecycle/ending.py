"""How the program ended, which at exit nothing else tells: whether it ran out, and by which exception if it did not."""

from __future__ import annotations

import dis
import sys
import threading
import traceback
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Literal, NoReturn

FRAMES = 8
"""Innermost frames of the exception that ended the program, kept for its event."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended."""

    status: Literal["succeeded", "failed", "cancelled"]
    reason: str | None = None
    cause: Literal["crashed", "out_of_memory"] | None = None
    """Of a failure: the kind of its event."""
    frames: tuple[str, ...] = ()
    """Where it was raised, innermost last."""


class Ending:
    """Watches the process's end, from `watch` on.

    ``sys.excepthook`` is told of the exception that ended the program, but not of SystemExit; ``sys.exit`` is asked for
    its status, but may be caught. Which of them counts is seen at exit on the program's outermost frame: one that ran
    to its end stands on a return, one that an exception left stands where it was raised. The status of a
    ``raise SystemExit(status)`` that did not go through ``sys.exit`` cannot be seen; it counts as success.
    """

    def __init__(self) -> None:
        self._program: FrameType | None = None
        self._exception: Outcome | None = None
        self._status: object = None
        self._watching = False

    def watch(self) -> None:
        """Begin to watch: wraps ``sys.excepthook`` and ``sys.exit`` once, for as long as the process lives."""
        if self._watching:
            return
        self._watching = True
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            self._program, frame = frame, frame.f_back
        hook_before, exit_before = sys.excepthook, sys.exit

        def excepthook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
            # Not the exception itself: it would keep every frame's tensors.
            self._exception = _outcome(kind, _text(value), trace)
            hook_before(kind, value, trace)

        def exit(status: Any = None, /) -> NoReturn:
            """Exit the interpreter by raising SystemExit(status)."""
            if threading.current_thread() is threading.main_thread():
                self._status = status if status is None or isinstance(status, int) else str(status)
            exit_before(status)

        sys.excepthook, sys.exit = excepthook, exit

    def result(self) -> Outcome:
        """How the program ended and why. To be asked at exit."""
        if self._program is not None and _returned(self._program):
            return Outcome("succeeded")
        if self._exception is not None:
            return self._exception
        if self._status in (None, 0):
            return Outcome("succeeded")
        return Outcome("failed", f"SystemExit: {self._status}", "crashed")


def _outcome(kind: type[BaseException], text: str, trace: TracebackType | None) -> Outcome:
    if issubclass(kind, KeyboardInterrupt):
        return Outcome("cancelled", "KeyboardInterrupt")
    frames = tuple(f"{f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_tb(trace)[-FRAMES:])
    memory = issubclass(kind, MemoryError) or kind.__name__ == "OutOfMemoryError" or _speaks_of_memory(kind, text)
    return Outcome("failed", f"{kind.__name__}: {text}", "out_of_memory" if memory else "crashed", frames)


def _speaks_of_memory(kind: type[BaseException], text: str) -> bool:
    """Torch's CPU allocator, and some of its CUDA libraries, say it in a plain RuntimeError."""
    return issubclass(kind, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text.lower())


def _returned(frame: FrameType) -> bool:
    at = frame.f_lasti
    return at >= 0 and dis.opname[frame.f_code.co_code[at]].startswith("RETURN_")


def _text(value: BaseException) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - the user's own __str__
        return f"({type(error).__name__} while it was written out)"


ENDING = Ending()
"""Of this process."""
