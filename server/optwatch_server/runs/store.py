"""The store of recordings: a folder on a disk or in a bucket, whichever of fsspec's file systems its URL names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optwatch_server.database.engine import Database


def default_url(database: Database, environment: Mapping[str, str] = os.environ) -> str:
    """Return the folder beside an SQLite file, or for PostgreSQL one in this user's data folder, which replicas on
    other machines do not see."""
    if database.is_sqlite:
        return str(Path(str(database.url.database)).resolve().parent / "recordings")
    data = environment.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return str(Path(data) / "optwatch" / "recordings")


class StoreError(Exception):
    """The store did not do what it was asked; the text says which store, what and why."""


class Store:
    """Keeps bytes under paths. Opening it connects nothing and makes no folder.

    Raises:
        ValueError: the URL names a file system that fsspec does not know, or whose package is not installed.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # type: ignore[import-untyped]  # takes a moment, which `optwatch alerts` and its like need not wait for

        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"the store of recordings {_shown(url)!r} cannot be used ({error}): give a path, or the URL of a file "
                "system that fsspec knows, and install the package it names"
            ) from error
        self.shown = _shown(url)
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        self._is_local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)

    def put(self, path: str, data: bytes) -> None:
        """Keep `data` under `path`, in place of what is there; durable when this returns.

        Raises:
            StoreError: it is not kept.
        """
        place = f"{self._root}/{path}"
        try:
            if self._is_local:
                _write(Path(place), data)
            else:
                self._fs.pipe_file(place, data)
        except Exception as error:  # each file system has errors of its own
            raise StoreError(f"the store {self.shown} did not take {path}: {_reason(error)}") from error

    def get(self, path: str) -> bytes:
        """Return what is kept under `path`.

        Raises:
            StoreError: it is not there, or cannot be read now.
        """
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{path}"))
        except Exception as error:
            raise StoreError(f"the store {self.shown} did not give {path}: {_reason(error)}") from error

    def delete(self, path: str) -> None:
        """Delete what is kept under `path`; nothing where there is nothing.

        Raises:
            StoreError: it is still there.
        """
        try:
            self._fs.rm_file(f"{self._root}/{path}")
        except FileNotFoundError:
            return
        except Exception as error:
            raise StoreError(f"the store {self.shown} did not delete {path}: {_reason(error)}") from error


def _write(path: Path, data: bytes) -> None:
    """Write a file that is whole whenever the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _shown(url: str) -> str:
    """The URL without what may be a password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
