"""Messages on disk: kept in order, bounded, locked while their process lives, and in memory where the disk fails."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optwatch.delivery.spool import Spool, default_directory, orphans
from optwatch.faults import Faults

SERVER = "http://optwatch:8000"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    """Opens spools, each closed in the end."""
    opened: list[Spool] = []

    def make(name: str = "a", server: str = SERVER, max_bytes: int = 2**20, **options: Any) -> Spool:
        path = options.pop("path", tmp_path / f"{name}.sqlite3")
        opened.append(Spool(path, server, max_bytes, Faults(), **options))
        return opened[-1]

    yield make
    for made in opened:
        made._release()


def bodies(spool: Spool) -> list[Any]:
    return [message.body["n"] for message in spool.first(10**6)]


@given(st.lists(st.one_of(st.none(), st.integers(1, 5)), max_size=40))
def test_messages_come_out_in_the_order_in_which_they_went_in(operations: list[int | None]) -> None:
    spool = Spool(Path("/dev/null/none"), SERVER, 2**20, Faults())  # there is no such folder: it works in memory
    expected: list[int] = []
    for number, operation in enumerate(operations):
        if operation is None:
            spool.append("/p", {"n": number})
            expected.append(number)
        else:
            spool.acknowledge(spool.first(operation))
            del expected[:operation]
        assert (bodies(spool), len(spool)) == (expected, len(expected))
    spool.close()


def test_it_takes_messages_up_to_its_bound_and_not_one_byte_more(spool: Any) -> None:
    size = len(json.dumps({"n": 1}))
    full = spool(max_bytes=3 * size)
    assert [full.append("/p", {"n": n}) for n in range(4)] == [True, True, True, False]
    assert (bodies(full), full.dropped) == ([0, 1, 2], 1)
    full.acknowledge(full.first(1))
    assert full.append("/p", {"n": 9})
    assert bodies(full) == [1, 2, 9]


def test_a_runs_end_has_room_in_a_full_one(spool: Any) -> None:
    full = spool(max_bytes=1)
    assert not full.append("/p", {"n": 1})
    assert full.append("/p/finish", {"n": 2}, vital=True)
    assert bodies(full) == [2]


def test_the_bound_counts_what_was_there_before(spool: Any, tmp_path: Path) -> None:
    first = spool(max_bytes=20)
    first.append("/p", {"n": 1})
    first.close()
    again = spool(max_bytes=20)
    assert again.append("/p", {"n": 2})
    assert not again.append("/p", {"n": 3})


def test_an_emptied_spool_leaves_no_file(spool: Any, tmp_path: Path) -> None:
    made = spool()
    made.append("/p", {"n": 1})
    made.acknowledge(made.first(1))
    assert made.close() == 0
    assert list(tmp_path.iterdir()) == []


def test_one_that_holds_messages_is_found_by_the_next_process_and_only_for_its_server(
    spool: Any, tmp_path: Path
) -> None:
    ours, theirs = spool("ours"), spool("theirs", server="http://other:8000")
    for made in (ours, theirs):
        made.append("/p", {"n": 1})
        assert made.close() == 0
    found = [(each.path.name, bodies(each), each.close())[:2] for each in orphans(tmp_path, SERVER, 2**20, Faults())]
    assert found == [("ours.sqlite3", [1])]
    assert (tmp_path / "theirs.sqlite3").exists()
    (left,) = orphans(tmp_path, "http://other:8000", 2**20, Faults())
    assert (left.server, bodies(left)) == ("http://other:8000", [1])
    left.close()


def test_that_of_a_living_process_is_not_touched(spool: Any, tmp_path: Path) -> None:
    spool().append("/p", {"n": 1})
    faults = Faults()
    assert list(orphans(tmp_path, SERVER, 2**20, faults)) == []
    assert faults.counts == {}


def test_it_remembers_its_run_for_those_who_inherit_it(spool: Any, tmp_path: Path) -> None:
    made = spool(run={"id": "r", "schema": 1})
    made.append("/p", {"n": 1})
    made.close()
    (inherited,) = orphans(tmp_path, SERVER, 2**20, Faults())
    assert inherited.run == {"id": "r", "schema": 1}
    inherited.close()


def test_a_torn_file_is_counted_once_and_set_aside(tmp_path: Path) -> None:
    (tmp_path / "torn.sqlite3").write_bytes(b"this is no database" * 100)
    for expected in ({"spool": 1}, {}):
        faults = Faults()
        assert list(orphans(tmp_path, SERVER, 2**20, faults)) == []
        assert faults.counts == expected
    assert (tmp_path / "torn.broken").exists()


@pytest.mark.parametrize("place", ["under a file", "in a folder that cannot be made"])
def test_where_nothing_can_be_written_it_works_in_memory_and_counts_it(place: str, spool: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = {"under a file": tmp_path / "file" / "a.sqlite3"}.get(place, Path("/proc/none/a.sqlite3"))
    made = spool(path=path)
    assert made.append("/p", {"n": 1})
    assert (bodies(made), made._faults.counts, made.on_disk) == ([1], {"spool": 1}, False)
    assert made.close() == 1  # told, so that the loss is counted


FULL_DISK = """
import resource, sys
from pathlib import Path
from optwatch.faults import Faults
from optwatch.delivery.spool import Spool
spool = Spool(Path(sys.argv[1]), "http://optwatch:8000", 2**20, Faults())
for n in range(10):
    spool.append("/p", {"n": n, "text": "x" * 1000})
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
for n in range(10, 100):
    assert spool.append("/p", {"n": n, "text": "x" * 1000})
assert not spool.on_disk and spool._faults.counts == {"spool": 1}, spool._faults.counts
assert [m.body["n"] for m in spool.first(1000)] == list(range(100))
assert spool.append("/p", {"n": 100}) and spool._faults.counts == {"spool": 1}
spool.acknowledge(spool.first(101))
assert len(spool) == 0
print(sorted(p.name for p in Path(sys.argv[1]).parent.iterdir()))
spool.close()
print(sorted(p.name for p in Path(sys.argv[1]).parent.iterdir()))
"""


def test_a_disk_that_fills_up_costs_no_message_and_leaves_no_file_once_all_are_delivered(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "a.sqlite3")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert "a.sqlite3" in before
    assert after == "[]"


def test_a_delete_that_the_disk_refuses_is_remembered_in_memory(spool: Any) -> None:
    made = spool()
    for n in range(3):
        made.append("/p", {"n": n})
    made._db.execute("pragma query_only=on")  # as a file system does that goes read-only after an error
    made.acknowledge(made.first(2))
    assert (bodies(made), made._faults.counts, made.on_disk) == ([2], {"spool": 1}, False)


def test_what_a_killed_process_wrote_is_there(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom optwatch.faults import Faults\n"
        "from optwatch.delivery.spool import Spool\n"
        f"spool = Spool(Path(sys.argv[1]), {SERVER!r}, 2**20, Faults())\n"
        "for n in range(500):\n    spool.append('/p', {'n': n})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.sqlite3")], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    (found,) = orphans(tmp_path, SERVER, 2**20, Faults())
    assert bodies(found) == list(range(500))
    found.acknowledge(found.first(500))
    found.close()
    assert list(tmp_path.iterdir()) == []


def test_somebody_who_holds_every_object_of_the_process_does_not_disturb_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `attach` looks for the model among all objects, on another thread and at the time at which a spool is opened: so
    # it may hold each cursor that is alive after any of these statements.
    held: list[object] = []

    class Holding(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            held.append(super().execute(*arguments))
            return held[-1]  # type: ignore[return-value]

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **options: connect(*a, **options, factory=Holding))
    faults = Faults()
    made = Spool(tmp_path / "a.sqlite3", SERVER, 2**20, faults)
    made.append("/p", {"n": 1})
    made.acknowledge(made.first(1))
    made.close()
    assert held
    assert faults.counts == {}


def test_the_default_folder_is_the_users_state_or_one_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_directory() == Path("/state/optwatch/spool")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_directory() == Path("/home/u/.local/state/optwatch/spool")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 123456)  # a container under a user id that nobody knows
    assert default_directory().parts[-2:] == ("optwatch-123456", "spool")
