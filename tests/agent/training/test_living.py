"""Looking for objects finds them all, and hurts no thread that is making some meanwhile."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from optwatch.training.living import living


class Base: ...


class Derived(Base): ...


class Pretender:
    @property  # type: ignore[misc]
    def __class__(self) -> type:  # pragma: no cover - asking would be the fault
        raise AssertionError("its code was run")


def test_objects_of_a_class_and_of_those_derived_from_it_are_found_and_nobody_s_code_is_run() -> None:
    held = [Base(), Derived(), [Derived()], Pretender()]
    found = living(Base)
    assert {id(x) for x in found} == {id(held[0]), id(held[1]), id(held[2][0])}  # type: ignore[index]
    assert living(Derived, Base).__len__() == 3
    assert gc.isenabled()


def faults_while(look: Callable[[], object]) -> int:
    """Errors in threads that fill tuples, while this one looks."""
    stop, faults = threading.Event(), 0

    def slowly() -> Iterator[int]:
        for i in range(2000):
            if i % 500 == 0:
                stop.wait(0.0005)
            yield i

    def fill() -> None:
        nonlocal faults
        while not stop.is_set():
            try:
                tuple(slowly())
            except SystemError:
                faults += 1

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(12):
        look()
    stop.set()
    for thread in threads:
        thread.join()
    return faults


def test_a_thread_that_is_filling_a_tuple_goes_on() -> None:
    assert faults_while(lambda: living(Base)) == 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="tuples are made another way since 3.14")
def test_a_walk_that_lets_threads_in_is_noticed() -> None:
    def naive() -> None:
        objects = gc.get_objects()
        for _ in range(20):
            threading.Event().wait(0.001)
        del objects

    assert faults_while(naive) > 0
