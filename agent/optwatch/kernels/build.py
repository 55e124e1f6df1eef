"""Compiles a kernel with the machine's own C compiler, once for a machine and source, into a folder of the user's own.

A library is code that runs in the training process: it is taken only from a folder that nobody but the user can write
to, and only after a process of its own has run it. What fails here raises `OSError`; the caller goes on without.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SOURCE = Path(__file__).with_name("reduce.c")
FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi")
TIMEOUT_SECONDS = 120
LEFT_OVER_SECONDS = 3600
"""Age at which an unfinished library is that of a process which has ended."""


def library(folder: Path | None = None) -> Path:
    """The compiled kernel, from the cache or newly made (about a second). For a background thread: it reads files and
    starts processes.

    ``folder`` is the cache; none: ``$XDG_CACHE_HOME/optwatch`` or its default.

    Raises:
        OSError: there is no compiler, it failed, the library does not work here, or the cache is not the user's alone.
    """
    folder = _own_folder(folder)
    compiler = _compiler()
    path = folder / f"reduce-{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    _insist_on_owner(path)
    return path


def _compiler() -> list[str]:
    """``$CC`` or the usual names: the command, with its absolute path."""
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise FileNotFoundError("no C compiler: neither $CC, cc, gcc nor clang is on the PATH")


def _key(compiler: list[str]) -> str:
    """What the library depends on. A home directory is often shared by machines of several kinds."""
    version = _run([*compiler, "--version"])
    parts = (SOURCE.read_text(), *compiler, version, *FLAGS, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _processor() -> str:
    """The processor and its instruction sets, on which ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {platform.node()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(compiler: list[str], path: Path) -> None:
    for left_over in path.parent.glob("building-*"):
        if left_over.stat().st_mtime < time.time() - LEFT_OVER_SECONDS:
            left_over.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=path.parent)
    os.close(handle)
    made = Path(name)
    try:
        _run([*compiler, *FLAGS, str(SOURCE), "-o", str(made)])
        # An instruction that this processor lacks ends a process: not the one that trains.
        _run([sys.executable, "-I", str(Path(__file__).with_name("check.py")), str(made)])
        made.chmod(0o700)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{shlex.join(command)}: took more than {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        raise OSError(f"{shlex.join(command)}: status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _own_folder(folder: Path | None) -> Path:
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME")
        folder = (Path(base) if base else Path.home() / ".cache") / "optwatch"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _insist_on_owner(folder)
    return folder


def _insist_on_owner(path: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"{path}: code is loaded from here, so it must be yours and writable by nobody else")
