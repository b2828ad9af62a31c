"""What a GGUF file says of itself: its metadata, and the directory of its tensors.

Read by our own hand: every count and offset of a file that was downloaded is a claim that may be
wrong, and the ``gguf`` package's reader takes seconds for a vocabulary where this takes a tenth.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from precast.errors import ModelCorrupt
from precast.system.pointer import refuse_pointer

VERSIONS: Final = (2, 3)
_MAX_TEXT: Final = 16 << 20
_MAX_RANK: Final = 4
_SCALARS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
    7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""The format's numbers of types, as numpy names them."""
_STRING: Final = 8
_ARRAY: Final = 9

Scalar = int | float | bool | str
Value = Scalar | list[str] | np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor is in the file."""

    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    type: GGMLQuantizationType
    start: int
    """Byte of the file."""
    row_bytes: int

    @property
    def nbytes(self) -> int:
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.row_bytes


def first_text(path: Path, wanted: str) -> str | None:
    """The string of a key; no more is read than what comes before it. None where it is missing or
    can't be read: reading all of the file says why."""
    try:
        with path.open("rb") as file:
            cursor = _Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for _ in range(_counts(cursor)[1]):
            key, value = cursor.string(), cursor.value(cursor.u32())
            if key == wanted:
                return value if isinstance(value, str) else None
    except (OSError, ValueError, _Malformed):
        pass
    return None


class GgufFile:
    """A mapped file. Every method raises ``ModelCorrupt`` with one line for what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fields: Mapping[str, Value]
        self.tensors: Mapping[str, TensorEntry]
        refuse_pointer(path)
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 8:
                raise ModelCorrupt(f"{path}: not a readable GGUF file: it has {size} bytes")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.fields, self.tensors = _read(_Cursor(self._data))
        except _Malformed as error:
            raise ModelCorrupt(f"{path}: not a readable GGUF file: {error}") from None

    def rows(self, name: str, first: int, last: int) -> np.ndarray[Any, Any]:
        """uint8 [last - first, bytes of a row]: a tensor's rows as they are in the file."""
        entry = self.tensors[name]
        start = entry.start + first * entry.row_bytes
        flat = np.frombuffer(self._data, np.uint8, (last - first) * entry.row_bytes, start)
        return flat.reshape(last - first, entry.row_bytes)

    def text(self, key: str, default: str = "") -> str:
        return str(self._typed(key, str, "a string", default))

    def integer(self, key: str, default: int | None = None) -> int:
        """Without a default the key has to be there."""
        return int(self._typed(key, int, "an integer", default))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._typed(key, (int, float), "a number", default))

    def flag(self, key: str, default: bool) -> bool:
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise ModelCorrupt(f"{self.path}: {key} is not true or false")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.fields.get(key)
        if value is None:
            raise ModelCorrupt(f"{self.path}: {key} is missing")
        if not isinstance(value, list):
            raise ModelCorrupt(f"{self.path}: {key} is not an array of strings")
        return value

    def numbers(self, key: str) -> np.ndarray[Any, Any] | None:
        """An array of numbers; None if there is none."""
        value = self.fields.get(key)
        if value is not None and not isinstance(value, np.ndarray):
            raise ModelCorrupt(f"{self.path}: {key} is not an array of numbers")
        return value

    def _typed(self, key: str, kind: Any, name: str, default: Scalar | None) -> Any:
        value = self.fields.get(key, default)
        if value is None:
            raise ModelCorrupt(f"{self.path}: {key} is missing")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelCorrupt(f"{self.path}: {key} is not {name}")
        return value


class _Malformed(Exception):
    """What is wrong with the bytes; the file's name is added outside."""


class _Cursor:
    """Reads forwards and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> int:
        """Moves over ``size`` bytes; returns where they begin."""
        if size > len(self.data) - self.at:
            raise _Malformed(f"it ends at byte {len(self.data)} within its header")
        begin, self.at = self.at, self.at + size
        return begin

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8))[0])

    def string(self) -> str:
        size = self.u64()
        if size > _MAX_TEXT:
            raise _Malformed(f"a string of {size} bytes at byte {self.at}")
        begin = self.take(size)
        # a vocabulary may hold halves of characters
        return self.data[begin : begin + size].decode("utf-8", "surrogateescape")

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array(self.u32(), self.u64())
        scalar: Scalar = self._numbers(kind, 1)[0].item()
        return scalar

    def _array(self, kind: int, count: int) -> Value:
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        return self._numbers(kind, count)

    def _numbers(self, kind: int, count: int) -> np.ndarray[Any, Any]:
        if kind not in _SCALARS:
            raise _Malformed(f"a value of type {kind} at byte {self.at}")
        dtype = np.dtype(_SCALARS[kind])
        begin = self.take(dtype.itemsize * count)
        return np.frombuffer(self.data, dtype, count, begin)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Tensors and fields, as the file's first bytes say."""
    if (magic := cursor.data[:4]) != b"GGUF":
        raise _Malformed(f"it begins with {magic!r}")
    cursor.take(4)
    _check_version(cursor.u32())
    return cursor.u64(), cursor.u64()


def _read(cursor: _Cursor) -> tuple[dict[str, Value], dict[str, TensorEntry]]:
    tensors, entries = _counts(cursor)
    fields: dict[str, Value] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in fields:
            raise _Malformed(f"{_shown(key)} is there twice")
        fields[key] = cursor.value(cursor.u32())
    found: dict[str, TensorEntry] = {}
    for _ in range(tensors):
        name, entry = _tensor(cursor)
        if name in found:
            raise _Malformed(f"tensor {_shown(name)} is there twice")
        found[name] = entry
    return fields, _placed(cursor, fields, found)


def _check_version(version: int) -> None:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS and swapped in VERSIONS:
        raise _Malformed("it is big-endian; only little-endian files are read")
    if version not in VERSIONS:
        raise _Malformed(f"version {version}; versions 2 and 3 are read")


def _tensor(cursor: _Cursor) -> tuple[str, TensorEntry]:
    """``start`` still counts from the beginning of the data."""
    name, rank = cursor.string(), cursor.u32()
    if not 1 <= rank <= _MAX_RANK:
        raise _Malformed(f"tensor {_shown(name)} has {rank} dimensions")
    sizes = [cursor.u64() for _ in range(rank)]
    number = cursor.u32()
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise _Malformed(f"tensor {_shown(name)} has type {number}, which is unknown") from None
    if 0 in sizes or sizes[0] % block:
        raise _Malformed(f"tensor {_shown(name)} of {kind.name} has sizes {sizes}")
    entry = TensorEntry(
        shape=tuple(reversed(sizes)),
        type=kind,
        start=cursor.u64(),
        row_bytes=sizes[0] // block * block_bytes,
    )
    return name, entry


def _placed(
    cursor: _Cursor, fields: Mapping[str, Value], tensors: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """With offsets into the file. A file that was cut off is found here."""
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise _Malformed(f"general.alignment is {alignment}")
    base = -(-cursor.at // alignment) * alignment
    placed = {
        name: TensorEntry(
            shape=entry.shape, type=entry.type, start=base + entry.start, row_bytes=entry.row_bytes
        )
        for name, entry in tensors.items()
    }
    end = max((entry.start + entry.nbytes for entry in placed.values()), default=0)
    if end > len(cursor.data):
        raise _Malformed(
            f"it is cut off: {len(cursor.data)} bytes, but its tensors end at byte {end}"
        )
    return placed


def _shown(name: str) -> str:
    """A name out of the file, fit for one line."""
    return ascii(name[:80])[1:-1]
