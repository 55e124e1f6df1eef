"""The file of a black box: rings of fixed slots behind a header, readable whenever its writer died.

Each slot carries a sequence number and a checksum over all of it, so that one which was being written is recognised,
and only that one is lost. Slots are written with ``pwrite`` and not through a mapping: what is in the page cache
survives SIGKILL either way, but where the disk is full, gone or read-only a mapping kills the process with SIGBUS, and
where it is slow a page fault holds the interpreter's lock, on which training waits. Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import struct
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

MAGIC = b"optwatch black box\n"
VERSION = 1
ABSENT = -float("inf")
"""A member of a series that was not measured. No norm, mean or ratio is ever this."""
_PREFIX = struct.Struct("<20sIII")  # magic, version, length of the compressed header, its checksum
_SLOT = struct.Struct("<IIQQ")  # checksum of what follows it, length of a text, sequence number, measured columns
_ALIGNMENT = 4096
_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2}
_LARGEST = {"float32": 3.4028234663852886e38, "bfloat16": 3.3895313892515355e38}
_MAX_HEADER_BYTES = 64 * 2**20

Type = Literal["float64", "float32", "bfloat16"]
Value = float | Sequence[float | None] | None


class BlackBoxError(ValueError):
    """A file is no black box that this version can read; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class Column:
    """A number of each row, or with `members` a series of them: one for each layer or parameter."""

    name: str
    type: Type = "float64"
    members: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """Bytes in a slot."""
        return _SIZES[self.type] * (1 if self.members is None else len(self.members))


@dataclass(frozen=True, slots=True)
class Table:
    """One ring. Its columns are at most 64, single numbers first; without any it holds texts of `text_bytes`."""

    name: str
    optimizer: str
    slots: int
    columns: tuple[Column, ...] = ()
    text_bytes: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, a multiple of 8."""
        payload = sum(column.size for column in self.columns) if self.columns else self.text_bytes
        return _SLOT.size + (payload + 7) // 8 * 8


@dataclass(frozen=True, slots=True)
class Rows:
    """What a ring held, oldest first."""

    table: Table
    sequences: list[int]
    measured: list[int]
    """For each row, bit i is set where column i was measured."""
    payloads: list[bytes]
    torn: int
    """Slots that were being written when the process died."""

    def column(self, name: str) -> list[Any]:
        """The values of a column by row: a number, or a list of them with None for absent members; None where the row
        has none.

        Raises:
            KeyError: there is no such column.
        """
        offset = 0
        for index, column in enumerate(self.table.columns):
            if column.name == name:
                return [
                    _unpack(column, payload[offset : offset + column.size]) if mask >> index & 1 else None
                    for payload, mask in zip(self.payloads, self.measured, strict=True)
                ]
            offset += column.size
        raise KeyError(name)

    def matrix(self, name: str) -> bytes:
        """A series as it is stored: its rows' bytes one after the other; rows without it hold `ABSENT` throughout."""
        offset = 0
        for index, column in enumerate(self.table.columns):
            if column.name == name:
                absent = pack_series([ABSENT] * len(column.members or ()), column.type)
                return b"".join(
                    payload[offset : offset + column.size] if mask >> index & 1 else absent
                    for payload, mask in zip(self.payloads, self.measured, strict=True)
                )
            offset += column.size
        raise KeyError(name)

    def texts(self) -> list[dict[str, Any]]:
        """The JSON objects of a table of texts."""
        return [json.loads(payload) for payload in self.payloads]


@dataclass(frozen=True, slots=True)
class Contents:
    """A black box as it was read."""

    path: Path
    header: dict[str, Any]
    rows: list[Rows]

    def table(self, name: str, optimizer: str = "") -> Rows | None:
        """One of its rings."""
        found = (rows for rows in self.rows if (rows.table.name, rows.table.optimizer) == (name, optimizer))
        return next(found, None)


def pack_series(values: Sequence[float | None], kind: str) -> bytes:
    """Numbers as little-endian bytes; None becomes `ABSENT`. One that is finite stays so, however large."""
    if kind == "float64":
        return struct.pack(f"<{len(values)}d", *values)
    try:
        packed = struct.pack(f"<{len(values)}f", *values)
    except (OverflowError, struct.error):  # a number beyond float32, or one that is absent
        packed = struct.pack(f"<{len(values)}f", *(_fitting(value, _LARGEST[kind]) for value in values))
    if kind == "float32":
        return packed
    upper = bytearray(2 * len(values))  # bfloat16 is the upper half of a float32: three significant digits
    upper[0::2], upper[1::2] = packed[2::4], packed[3::4]
    return bytes(upper)


def _fitting(value: float | None, most: float) -> float:
    if value is None:
        return ABSENT
    return value if value - value != 0 else max(-most, min(value, most))


def unpack_series(data: bytes, kind: str) -> tuple[float, ...]:
    """The numbers of `pack_series`."""
    if kind == "bfloat16":
        whole = bytearray(2 * len(data))
        whole[2::4], whole[3::4] = data[0::2], data[1::2]
        data, kind = bytes(whole), "float32"
    return struct.unpack(f"<{len(data) // _SIZES[kind]}{'d' if kind == 'float64' else 'f'}", data)


def _unpack(column: Column, data: bytes) -> float | list[float | None]:
    values = unpack_series(data, column.type)
    return values[0] if column.members is None else [None if value == ABSENT else value for value in values]


def header_bytes(header: Mapping[str, Any], tables: Sequence[Table]) -> bytes:
    """The beginning of the file: what is in it, padded so that the first ring begins on a page."""
    document = {**header, "tables": [asdict(table) for table in tables]}
    packed = zlib.compress(json.dumps(document).encode())
    begin = _PREFIX.pack(MAGIC, VERSION, len(packed), zlib.crc32(packed)) + packed
    return begin + bytes(-len(begin) % _ALIGNMENT)


_open: weakref.WeakSet[RingFile] = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child: a copy of the descriptor would hold the lock for as long as the child outlives its parent."""
    for file in list(_open):
        file.abandon()


os.register_at_fork(after_in_child=_after_fork)


class RingFile:
    """A black box that is being written, locked while this process lives.

    The file appears under its name when it is complete: with its header, its space reserved on the disk, and the rows
    of `carried` in it. Replaces what was there.

    Raises:
        OSError: the file cannot be made, locked or given its space.
    """

    def __init__(
        self, path: Path, header: Mapping[str, Any], tables: Sequence[Table], carried: Sequence[Rows] = ()
    ) -> None:
        self.path = path
        self.tables = list(tables)
        self._sequences = [0] * len(self.tables)
        begin = header_bytes(header, tables)
        self._offsets = []
        self.size = len(begin)
        for table in tables:
            self._offsets.append(self.size)
            self.size += table.slots * table.slot_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        self._file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _reserve(self._file, self.size)
            _write(self._file, begin, 0)
            for index, table in enumerate(tables):
                for rows in carried:
                    if (rows.table.name, rows.table.optimizer) == (table.name, table.optimizer):
                        self._carry(index, rows)
            temporary.replace(path)
        except BaseException:
            os.close(self._file)
            temporary.unlink(missing_ok=True)
            raise
        _open.add(self)

    def write(self, index: int, values: Sequence[Value]) -> None:
        """Put a row into a ring, one value for each column; None was not measured. One system call, no wait for disk.

        Raises:
            OSError: it could not be written; the rows before it are untouched.
        """
        columns = self.tables[index].columns
        measured = sum(1 << bit for bit, value in enumerate(values) if value is not None)
        single = next((i for i, column in enumerate(columns) if column.members is not None), len(columns))
        parts = [struct.pack(f"<{single}d", *(0.0 if value is None else value for value in values[:single]))]
        for column, value in zip(columns[single:], values[single:], strict=True):
            parts.append(bytes(column.size) if value is None else pack_series(value, column.type))  # type: ignore[arg-type]
        self._put(index, measured, b"".join(parts))

    def write_text(self, index: int, value: Mapping[str, Any]) -> None:
        """Put a JSON object into a ring of texts.

        Raises:
            ValueError: it is longer than the ring's slots.
            OSError: as `write`.
        """
        text = json.dumps(value).encode()
        if len(text) > self.tables[index].text_bytes:
            raise ValueError(f"a text of {len(text)} bytes: the slot has {self.tables[index].text_bytes}")
        self._put(index, 0, text, len(text))

    def _put(self, index: int, measured: int, payload: bytes, length: int = 0) -> None:
        table = self.tables[index]
        sequence = self._sequences[index] + 1
        payload += bytes(table.slot_bytes - _SLOT.size - len(payload))
        slot = _SLOT.pack(0, length, sequence, measured) + payload
        slot = struct.pack("<I", zlib.crc32(slot[4:])) + slot[4:]
        _write(self._file, slot, self._offsets[index] + (sequence - 1) % table.slots * table.slot_bytes)
        self._sequences[index] = sequence

    def _carry(self, index: int, rows: Rows) -> None:
        """Bring rows of another layout into a new ring, by the names of columns and members."""
        table = self.tables[index]
        if not table.columns:
            for text in rows.texts()[-table.slots :]:
                self.write_text(index, text)
            return
        before = {column.name: column for column in rows.table.columns}
        columns: list[list[Value]] = []
        for column in table.columns:
            if column.name not in before:
                columns.append([None] * len(rows.payloads))
                continue
            values, old = rows.column(column.name), before[column.name].members
            if column.members is not None and old is not None:
                at = {name: i for i, name in enumerate(old)}
                order = [at.get(name) for name in column.members]
                values = [
                    None if row is None else [ABSENT if i is None or row[i] is None else row[i] for i in order]
                    for row in values
                ]
            columns.append(values)
        for row in list(zip(*columns, strict=True))[-table.slots :]:
            self.write(index, row)

    def abandon(self) -> None:
        """Close the file and leave it where it is; whoever comes next takes it for that of a dead process."""
        _open.discard(self)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        """Close the file and delete it."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.abandon()


def _reserve(file: int, size: int) -> None:
    """Take the space now: a disk that is full says so here, and not at the step that matters."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, size)  # a file system without reservations


def _write(file: int, data: bytes, offset: int) -> None:
    written = os.pwrite(file, data, offset)
    if written != len(data):
        raise OSError(errno.ENOSPC, f"{written} of {len(data)} bytes written")


def read(path: Path) -> Contents:
    """Read a black box, of a dead process or of a living one.

    Raises:
        BlackBoxError: it is none, is of another version, or is damaged.
        OSError: it cannot be read.
    """
    return parse(path, path.read_bytes())


def parse(path: Path, data: bytes) -> Contents:
    """`read`, of bytes that are in memory; `path` is only named."""
    if len(data) < _PREFIX.size or not data.startswith(MAGIC):
        raise BlackBoxError(f"{path} is no black box: it does not begin with {MAGIC.decode().strip()!r}")
    _, version, length, checksum = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise BlackBoxError(
            f"{path} is a black box of version {version}, and this optwatch reads {VERSION}: use the one that wrote it"
        )
    packed = data[_PREFIX.size : _PREFIX.size + length]
    if len(packed) < length:
        raise BlackBoxError(f"{path} is truncated: its header has {len(packed)} of {length} bytes")
    try:
        if zlib.crc32(packed) != checksum:
            raise ValueError("its checksum does not fit")
        header = json.loads(zlib.decompressobj().decompress(packed, _MAX_HEADER_BYTES))
        tables = [_table(table) for table in header.pop("tables")]
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
        raise BlackBoxError(f"{path} is damaged: the header cannot be read ({error})") from None
    offset = -(-(_PREFIX.size + length) // _ALIGNMENT) * _ALIGNMENT
    expected = offset + sum(table.slots * table.slot_bytes for table in tables)
    if len(data) < expected:
        raise BlackBoxError(f"{path} is truncated: it has {len(data)} of {expected} bytes")
    found = []
    for table in tables:
        found.append(_rows(table, data, offset))
        offset += table.slots * table.slot_bytes
    return Contents(path, header, found)


def _table(document: Mapping[str, Any]) -> Table:
    columns = (
        Column(c["name"], c["type"], None if c["members"] is None else tuple(c["members"])) for c in document["columns"]
    )
    table = Table(document["name"], document["optimizer"], document["slots"], tuple(columns), document["text_bytes"])
    if not (table.slots > 0 and table.slot_bytes > 0 and len(table.columns) <= 64):
        raise ValueError(f"a ring of {table.slots} slots with {len(table.columns)} columns")
    return table


def _rows(table: Table, data: bytes, offset: int) -> Rows:
    slots = []
    torn = 0
    for index in range(table.slots):
        begin = offset + index * table.slot_bytes
        slot = data[begin : begin + table.slot_bytes]
        checksum, length, sequence, measured = _SLOT.unpack_from(slot)
        if checksum == zlib.crc32(slot[4:]) and sequence and (sequence - 1) % table.slots == index:
            end = _SLOT.size + length if not table.columns else None
            slots.append((sequence, measured, slot[_SLOT.size : end]))
        elif any(slot):  # one that was never written holds zeros
            torn += 1
    slots.sort(key=lambda slot: slot[0])
    return Rows(table, [s[0] for s in slots], [s[1] for s in slots], [s[2] for s in slots], torn)


def is_alive(path: Path) -> bool:
    """Whether the process that writes this black box lives.

    Raises:
        OSError: the file is gone or cannot be opened.
    """
    try:
        os.close(lock(path))
    except BlockingIOError:
        return True
    return False


def lock(path: Path) -> int:
    """Take over a dead process's black box: a descriptor that holds its lock until it is closed.

    Raises:
        BlockingIOError: its process lives, or another one takes it over.
        FileNotFoundError: it is gone, maybe since a moment ago.
        OSError: it cannot be opened.
    """
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here, there = os.fstat(file), path.stat()  # whoever held the lock before may have deleted the file
        if (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
            raise FileNotFoundError(errno.ENOENT, "replaced while it was locked", str(path))
    except BaseException:
        os.close(file)
        raise
    return file
