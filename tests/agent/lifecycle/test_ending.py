"""How a program ended, seen from inside at exit: programs of a few lines, each ended in its own way."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
import atexit, os, signal, sys, threading
from optwatch.lifecycle.ending import ENDING
ENDING.watch()
ENDING.watch()

def tell():
    outcome = ENDING.result()
    print(outcome.status, outcome.reason)

atexit.register(tell)
"""
# What the program does then, its exit status, and what is said of it.
ENDS = {
    "it runs to its end": ("", 0, "succeeded", None),
    "sys.exit() without a status": ("sys.exit()", 0, "succeeded", None),
    "sys.exit(0)": ("sys.exit(0)", 0, "succeeded", None),
    "an exception": ("raise KeyError('vocab')", 1, "failed", "KeyError: 'vocab'"),
    "an exception without a text of its own": (
        """
        class Odd(Exception):
            def __str__(self):
                raise ValueError
        raise Odd
        """,
        1,
        "failed",
        "Odd: (ValueError while it was written out)",
    ),
    "an exception after a cleanup": (
        """
        try:
            raise RuntimeError("boom")
        finally:
            sys.stdout.flush()
        """,
        1,
        "failed",
        "RuntimeError: boom",
    ),
    "sys.exit(3)": ("sys.exit(3)", 3, "failed", "SystemExit: 3"),
    "sys.exit with a message": ("sys.exit('no data')", 1, "failed", "SystemExit: no data"),
    "sys.exit deep in a call, through a cleanup": (
        """
        def deep():
            try:
                sys.exit(4)
            finally:
                sys.stdout.flush()
        with open(os.devnull):
            deep()
        """,
        4,
        "failed",
        "SystemExit: 4",
    ),
    "a sys.exit that was caught": (
        """
        try:
            sys.exit(5)
        except SystemExit:
            pass
        """,
        0,
        "succeeded",
        None,
    ),
    "a sys.exit that ended a thread": (
        "thread = threading.Thread(target=sys.exit, args=(6,)); thread.start(); thread.join()",
        0,
        "succeeded",
        None,
    ),
    "an exception that was caught and shown": (
        """
        try:
            raise ValueError("one bad file")
        except ValueError:
            sys.excepthook(*sys.exc_info())
        """,
        0,
        "succeeded",
        None,
    ),
    "Ctrl-C": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT, "cancelled", "KeyboardInterrupt"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_programs_end_is_told_and_its_exit_status_unchanged(end: str, tmp_path: Path) -> None:
    code, exit_status, status, reason = ENDS[end]
    script = tmp_path / "program.py"
    script.write_text(PROGRAM + textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == (f"{status} {reason}\n", exit_status), done.stderr
    assert ("Traceback" in done.stderr) == any(word in code for word in ("raise ", "excepthook", "SIGINT"))


@pytest.mark.parametrize("status", ["0", "3"])
def test_a_module_run_by_its_name_ends_like_a_script(status: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(f"{PROGRAM}\ndef main():\n    return {status}\n\nsys.exit(main())\n")
    command = [sys.executable, "-m", "program"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == int(status)
    assert done.stdout == ("succeeded None\n" if status == "0" else "failed SystemExit: 3\n")


def test_watching_from_a_thread_watches_the_main_one(tmp_path: Path) -> None:
    code = PROGRAM.replace(
        "ENDING.watch()\nENDING.watch()", "t = threading.Thread(target=ENDING.watch); t.start(); t.join()"
    )
    for end, told in (("", "succeeded None\n"), ("sys.exit(2)", "failed SystemExit: 2\n")):
        done = subprocess.run(
            [sys.executable, "-c", code + end], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.stdout == told, done.stderr
