"""Compiles libraries with the machine's own compilers, once for a machine and source, into a folder of the user's own.

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
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

TIMEOUT_SECONDS = 600
LEFT_OVER_SECONDS = 3600
"""Age at which an unfinished library is that of a process which has ended."""
_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one library is made."""

    source: Path
    check: Path
    """Run with the library's path as a process of its own; its status is 0 where the library works on this machine."""
    compilers: tuple[str, ...]
    """Commands, of which the first that is there is used; empty ones are passed over."""
    flags: tuple[str, ...]
    paths: tuple[str, ...] = ()
    """Flags behind the source that name folders of this installation, on which the library does not depend."""
    depends: tuple[str, ...] = ()
    """What it depends on beside its source, flags, compiler and processor."""
    gently: bool = False
    """Whether training has the processors first, as it takes them long enough to be noticed."""


def reduce_recipe() -> Recipe:
    """The CPU's kernel: about a second."""
    flags = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
    compilers = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    header = (_HERE / "sums.h").read_text()
    return Recipe(_HERE / "reduce.c", _HERE / "check_reduce.py", compilers, flags, depends=(header,))


def locate_recipe() -> Recipe:
    """What locates tensors: ten seconds, since it is made against torch's own headers, and for this torch alone."""
    folder = Path(torch.__path__[0])
    abi = int(getattr(torch._C, "_GLIBCXX_USE_CXX11_ABI", True))
    return Recipe(
        _HERE / "locate.cpp",
        _HERE / "check_locate.py",
        (os.environ.get("CXX", ""), "c++", "g++", "clang++"),
        ("-O2", "-std=c++20", "-fPIC", "-shared", "-w", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        (
            f"-I{folder / 'include'}",
            f"-I{sysconfig.get_path('include')}",
            f"-L{folder / 'lib'}",
            *("-lc10", "-ltorch_cpu", "-ltorch_python"),
        ),
        (torch.__version__, str(torch.version.git_version), sys.version),
        gently=True,
    )


def library(recipe: Recipe, folder: Path | None = None) -> Path:
    """The compiled library, from the cache or newly made. For a background thread: it reads files, starts processes,
    and waits for another process that makes the same.

    ``folder`` is the cache; none: ``$XDG_CACHE_HOME/optwatch`` or its default.

    Raises:
        OSError: there is no compiler, it failed, the library does not work here, or the cache is not the user's alone.
    """
    folder = _own_folder(folder)
    compiler = _compiler(recipe)
    path = folder / f"{recipe.source.stem}-{_key(recipe, compiler)}.so"
    if not path.exists():
        with _alone(path):
            if not path.exists():
                _compile(recipe, compiler, path)
    _insist_on_owner(path)
    return path


def _compiler(recipe: Recipe) -> list[str]:
    """The command, with its absolute path."""
    for command in recipe.compilers:
        words = shlex.split(command)
        if words and (found := shutil.which(words[0])):
            return [found, *words[1:]]
    raise FileNotFoundError(f"no compiler for {recipe.source.name}: none of {', '.join(recipe.compilers)} is there")


def _key(recipe: Recipe, compiler: list[str]) -> str:
    """What the library depends on. A home directory is often shared by machines of several kinds."""
    version = _run([*compiler, "--version"])
    parts = (recipe.source.read_text(), *compiler, version, *recipe.flags, *recipe.depends)
    return hashlib.sha256("\0".join((*parts, platform.machine(), _processor())).encode()).hexdigest()[:32]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one process at a time makes a library: the ranks of a machine all begin together."""
    try:
        import fcntl
    except ImportError as error:
        raise OSError(f"{path}: no lock of files on {sys.platform}") from error
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _processor() -> str:
    """The processor and its instruction sets, on which ``-march=native`` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor()} {platform.node()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _compile(recipe: Recipe, compiler: list[str], path: Path) -> None:
    for left_over in path.parent.glob("building-*"):
        if left_over.stat().st_mtime < time.time() - LEFT_OVER_SECONDS:
            left_over.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=path.parent)
    os.close(handle)
    made = Path(name)
    gently = ("nice",) if recipe.gently and shutil.which("nice") else ()
    try:
        _run([*gently, *compiler, *recipe.flags, str(recipe.source), "-o", str(made), *recipe.paths])
        # An instruction that this processor lacks ends a process: not the one that trains.
        _run([*gently, sys.executable, "-I", str(recipe.check), str(made), *sys.path])
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
