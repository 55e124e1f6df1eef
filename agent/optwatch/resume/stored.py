"""Reading a checkpoint without trusting it: files of torch.save and folders of torch.distributed.checkpoint.

Nothing is unpickled but tensors and plain containers (``weights_only=True``; the metadata of a folder, which torch
itself unpickles freely, by a list of its classes). What cannot be read is named, not raised.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP = b"PK\x03\x04"
METADATA = ".metadata"
CHUNK = 2**20
_INCOMPLETE = object()
Path_ = tuple[Any, ...]
"""Keys from the outermost container to a value."""


class UnusableError(Exception):
    """Nothing can be said of this path: there is nothing, or nothing that is a checkpoint or may be loaded."""


@dataclass
class Stored:
    """A checkpoint as far as it could be read."""

    kind: str
    """``torch.save`` or ``torch.distributed.checkpoint``."""
    bytes: int
    content: Any = None
    """The saved object, tensors on the CPU; those of a file are mapped into memory and not read yet."""
    damage: list[tuple[str, str]] = field(default_factory=list)
    """What is broken, and how: a tensor's path or a file's name, and a sentence."""
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> Stored:
    """Read a checkpoint. A folder is read into memory as a whole.

    Raises:
        UnusableError: there is no checkpoint there, or it holds objects that only code could bring back.
    """
    if not path.exists():
        raise UnusableError(f"there is nothing at {path}: give a file of torch.save or a folder of checkpoint shards")
    if path.is_dir():
        if not (path / METADATA).is_file():
            inside = sorted(entry.name for entry in path.iterdir())[:5]
            raise UnusableError(
                f"{path} is no folder of torch.distributed.checkpoint: it has no {METADATA}, which is written last. "
                f"It has {', '.join(inside) or 'nothing'}. Give the file, if it is one of these, or save again."
            )
        return _folder(path)
    return _file(path)


def tensors(content: Any, at: Path_ = ()) -> Iterator[tuple[Path_, Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, with the keys that lead to it."""
    if isinstance(content, Tensor):
        yield at, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors(value, (*at, key))


def named(path: Path_) -> str:
    """A path for a reader."""
    return ".".join(map(str, path)) or "the tensor"


def _file(path: Path) -> Stored:
    stored = Stored("torch.save", path.stat().st_size)
    with path.open("rb") as stream:
        head = stream.read(8)
    if not head:
        stored.damage.append((path.name, "the file is empty"))
        return stored
    if not zipfile.is_zipfile(path):
        if head[:4] == ZIP:
            told = f"cut short: the list of its records, which ends a file, is not within its {stored.bytes} bytes"
            stored.damage.append((path.name, told))
            return stored
        if head[:1] == b"\x80":  # a bare pickle: the format before torch 1.6
            stored.content = _load(path, mmap=False)
            return stored
        raise UnusableError(f"{path} is no file of torch.save: it begins with {head!r}")
    broken = _broken_records(path, stored)
    try:
        stored.content = _load(path, mmap=True)
    except UnusableError:
        if not broken:
            raise
        stored.damage += [(record, "its bytes do not have the CRC-32 they were written with") for record in broken]
        return stored
    if broken:
        names = _record_names(path, stored.content)
        for record in broken:
            told = "its bytes do not have the CRC-32 they were written with"
            stored.damage.append((names.get(record, record), told))
    return stored


def _load(source: Path | io.BytesIO, *, mmap: bool) -> Any:
    try:
        with getattr(torch.serialization, "safe_globals", contextlib.nullcontext)(_numpy_globals()):  # since 2.5
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        what = f"an object of {refused[1]}" if refused else "objects that are neither tensors nor plain containers"
        raise UnusableError(
            f"{source if isinstance(source, Path) else 'a record'} holds {what}, which is not loaded: unpickling it "
            "could run any code. Save tensors, numbers, texts and containers of them only (vars(args), not args)."
        ) from error
    except Exception as error:
        raise UnusableError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from error


def _numpy_globals() -> list[Any]:
    """What NumPy's random state is pickled with: arrays of numbers, which run no code."""
    try:
        import numpy as np

        core = importlib.import_module("numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray")
    except ImportError:
        return []
    kinds = [type(np.dtype(kind)) for kind in ("u4", "u8", "i4", "i8", "f4", "f8")]
    return [np.ndarray, np.dtype, *kinds, core._reconstruct]


def _broken_records(path: Path, stored: Stored) -> list[str]:
    """Names of the records whose bytes do not have their CRC-32. Reads the whole file."""
    broken = []
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        for record in records:
            try:
                with archive.open(record) as stream:
                    while stream.read(CHUNK):
                        pass
            except (zipfile.BadZipFile, OSError, NotImplementedError, EOFError):
                broken.append(record.filename)
    data = [record.filename for record in records if "/data/" in record.filename]
    if data and set(data) <= set(broken) and len(data) > 1:
        stored.notes.append("written without CRC-32 (torch.serialization.set_crc32_options): bytes cannot be checked")
        return []
    return broken


def _record_names(path: Path, content: Any) -> dict[str, str]:
    """Which tensors lie in which record, by the order of both in the file."""
    places: dict[int, list[str]] = {}
    for at, tensor in tensors(content):
        places.setdefault(tensor.untyped_storage().data_ptr(), []).append(named(at))
    with zipfile.ZipFile(path) as archive:
        records = sorted((r.header_offset, r.filename) for r in archive.infolist() if "/data/" in r.filename)
    if len(records) != len(places):
        return {}
    return {name: ", ".join(places[at]) for (_, name), at in zip(records, sorted(places), strict=True)}


_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}


class _Metadata(pickle.Unpickler):
    """Unpickles what the metadata of a folder consists of, and refuses everything else; torch refuses nothing."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise UnusableError(f"its {METADATA} holds an object of {module}.{name}, which could run any code")


def _folder(path: Path) -> Stored:
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    stored = Stored("torch.distributed.checkpoint", total)
    try:
        metadata = _Metadata(io.BytesIO((path / METADATA).read_bytes())).load()
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        paths = metadata.planner_data or {}
    except UnusableError as error:
        raise UnusableError(f"{path}: {error}") from None
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        stored.damage.append((METADATA, f"cannot be read: {error}"))
        return stored
    missing: dict[str, list[str]] = {}
    chunks: dict[str, list[tuple[Any, Any]]] = {}
    for index, place in places.items():
        file = path / place.relative_path
        if not file.is_file():
            missing.setdefault(place.relative_path, []).append(index.fqn)
            continue
        try:
            if place.transform_descriptors:
                stored.notes.append(f"{index.fqn} is stored transformed, and was not read")
                continue
            value = _load(_slice(file, place.offset, place.length), mmap=False)
            chunks.setdefault(index.fqn, []).append((index, value))
        except UnusableError as error:
            stored.damage.append((index.fqn, f"in {place.relative_path}: {error}"))
    for name, lost in missing.items():
        told = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        stored.damage.append((name, f"the file is missing, and with it {told}"))
    nested: dict[Any, Any] = {}
    for name, found in chunks.items():
        value = _assembled(entries[name], found)
        if value is _INCOMPLETE:
            if not any(name in lost for lost in missing.values()):
                stored.damage.append((name, "parts of the tensor are missing"))
            continue
        _put(nested, tuple(paths.get(name, (name,))), value)
    stored.content = _lists(nested)
    return stored


def _slice(file: Path, offset: int, length: int) -> io.BytesIO:
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(length)
    if len(content) < length:
        raise UnusableError(f"the file ends {length - len(content)} bytes too early")
    if content[:4] == ZIP:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                broken = archive.testzip()
        except zipfile.BadZipFile as error:
            raise UnusableError(str(error)) from error
        if broken is not None:
            raise UnusableError("its bytes do not have the CRC-32 they were written with")
    return io.BytesIO(content)


def _assembled(entry: Any, found: list[tuple[Any, Any]]) -> Any:
    """One value from its stored parts; `_INCOMPLETE` where parts of a tensor are missing."""
    if not hasattr(entry, "chunks"):
        return found[0][1]
    if len(found) < len(entry.chunks):
        return _INCOMPLETE
    if len(found) == 1 and tuple(found[0][1].shape) == tuple(entry.size):
        return found[0][1]
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    for index, part in found:
        offset = index.offset if index.offset is not None else [0] * part.dim()
        whole[tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return whole


def _put(nested: dict[Any, Any], path: Path_, value: Any) -> None:
    for key in path[:-1]:
        nested = nested.setdefault(key, {})
    nested[path[-1]] = value


def _lists(nested: Any) -> Any:
    """Dictionaries whose keys are 0, 1, 2, ... were lists."""
    if not isinstance(nested, dict):
        return nested
    made = {key: _lists(value) for key, value in nested.items()}
    if made and all(isinstance(key, int) for key in made) and sorted(made) == list(range(len(made))):
        return [made[i] for i in range(len(made))]
    return made
