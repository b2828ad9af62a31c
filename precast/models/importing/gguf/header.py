"""What a GGUF file says of itself: its metadata, and the directory of its tensors.

Read by our own hand: every count and offset of a file that was downloaded is a claim that may be
wrong, and the ``gguf`` package's reader takes seconds for a vocabulary where this takes a tenth.
"""

import itertools
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from precast.errors import ModelCorrupt
from precast.models.importing.gguf.cursor import Cursor, Malformed, Scalar, Value
from precast.models.importing.gguf.parts import find_parts
from precast.system.pointer import refuse_pointer

VERSIONS: Final = (2, 3)
_MAX_RANK: Final = 4


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where one tensor is."""

    shape: tuple[int, ...]
    """Rows first, as torch has it."""
    type: GGMLQuantizationType
    start: int
    """Byte of its part of the file."""
    row_bytes: int
    part: int = 0
    """Number of the part that it is in."""

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
            cursor = Cursor(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for _ in range(_counts(cursor)[1]):
            key, value = cursor.string(), cursor.value(cursor.u32())
            if key == wanted:
                return value if isinstance(value, str) else None
    except (OSError, ValueError, Malformed):
        pass
    return None


class GgufFile:
    """A mapped file, with all of its parts if it was split. Every method raises ``ModelCorrupt``
    with one line for what is wrong, the constructor ``ModelNotFound`` for parts that are not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        paths = find_parts(path)
        parts = [_read_part(part) for part in paths]
        _check_parts(paths, parts)
        self.fields: Mapping[str, Value] = parts[0].fields
        self.tensors: Mapping[str, TensorEntry] = _together(paths, parts)
        self.parts = len(parts)
        self._data = [part.data for part in parts]

    def rows(self, name: str, first: int, last: int) -> np.ndarray[Any, Any]:
        """uint8 [last - first, bytes of a row]: a tensor's rows as they are in the file."""
        entry = self.tensors[name]
        start = entry.start + first * entry.row_bytes
        flat = np.frombuffer(
            self._data[entry.part], np.uint8, (last - first) * entry.row_bytes, start
        )
        return flat.reshape(last - first, entry.row_bytes)

    def forget(self, name: str, first: int, last: int) -> None:
        """These rows won't be read again: pages of a mapped file count as the process's memory."""
        entry, page = self.tensors[name], mmap.PAGESIZE
        start = entry.start + first * entry.row_bytes
        end = entry.start + last * entry.row_bytes
        begin = start // page * page
        self._data[entry.part].madvise(mmap.MADV_DONTNEED, begin, end - begin)

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


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One file, and what its header says."""

    data: mmap.mmap
    fields: Mapping[str, Value]
    tensors: Mapping[str, TensorEntry]


def _read_part(path: Path) -> _Part:
    refuse_pointer(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        if size < 8:
            raise ModelCorrupt(f"{path}: not a readable GGUF file: it has {size} bytes")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        fields, tensors = _read(Cursor(data))
    except Malformed as error:
        raise ModelCorrupt(f"{path}: not a readable GGUF file: {error}") from None
    return _Part(data=data, fields=fields, tensors=tensors)


def _check_parts(paths: Sequence[Path], parts: Sequence[_Part]) -> None:
    """That each file is the part that its name says."""
    for number, (path, part) in enumerate(zip(paths, parts, strict=True), 1):
        own = _count(part, "split.no", 0) + 1, _count(part, "split.count", 0) or 1
        if own != (number, len(parts)):
            raise ModelCorrupt(
                f"{path}: by its header part {own[0]} of {own[1]}, by its name part {number} of "
                f"{len(parts)}; parts are called NAME-00001-of-00002.gguf and so on"
            )


def _count(part: _Part, key: str, default: int) -> int:
    """-1 for what is no number."""
    value = part.fields.get(key, default)
    return value if isinstance(value, int) else -1


def _together(paths: Sequence[Path], parts: Sequence[_Part]) -> dict[str, TensorEntry]:
    """The tensors of all parts."""
    found: dict[str, TensorEntry] = {}
    for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
        if both := sorted(found.keys() & part.tensors.keys()):
            raise ModelCorrupt(f"{path}: tensor {_shown(both[0])} is in another part too")
        found |= {name: replace(tensor, part=number) for name, tensor in part.tensors.items()}
    if (wanted := _count(parts[0], "split.tensors.count", len(found))) != len(found):
        raise ModelCorrupt(f"{paths[0]}: its parts have {len(found)} tensors, not {wanted}")
    return found


def _counts(cursor: Cursor) -> tuple[int, int]:
    """Tensors and fields, as the file's first bytes say."""
    if (magic := cursor.data[:4]) != b"GGUF":
        raise Malformed(f"it begins with {magic!r}")
    cursor.take(4)
    _check_version(cursor.u32())
    return cursor.u64(), cursor.u64()


def _read(cursor: Cursor) -> tuple[dict[str, Value], dict[str, TensorEntry]]:
    tensors, entries = _counts(cursor)
    fields: dict[str, Value] = {}
    for _ in range(entries):
        key = cursor.string()
        if key in fields:
            raise Malformed(f"{_shown(key)} is there twice")
        fields[key] = cursor.value(cursor.u32())
    found: dict[str, TensorEntry] = {}
    for _ in range(tensors):
        name, entry = _tensor(cursor)
        if name in found:
            raise Malformed(f"tensor {_shown(name)} is there twice")
        found[name] = entry
    return fields, _placed(cursor, fields, found)


def _check_version(version: int) -> None:
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    if version not in VERSIONS and swapped in VERSIONS:
        raise Malformed("it is big-endian; only little-endian files are read")
    if version not in VERSIONS:
        raise Malformed(f"version {version}; versions 2 and 3 are read")


def _tensor(cursor: Cursor) -> tuple[str, TensorEntry]:
    """``start`` still counts from the beginning of the data."""
    name, rank = cursor.string(), cursor.u32()
    if not 1 <= rank <= _MAX_RANK:
        raise Malformed(f"tensor {_shown(name)} has {rank} dimensions")
    sizes = [cursor.u64() for _ in range(rank)]
    number = cursor.u32()
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise Malformed(f"tensor {_shown(name)} has type {number}, which is unknown") from None
    if 0 in sizes or sizes[0] % block:
        raise Malformed(f"tensor {_shown(name)} of {kind.name} has sizes {sizes}")
    entry = TensorEntry(
        shape=tuple(reversed(sizes)),
        type=kind,
        start=cursor.u64(),
        row_bytes=sizes[0] // block * block_bytes,
    )
    return name, entry


def _placed(
    cursor: Cursor, fields: Mapping[str, Value], tensors: Mapping[str, TensorEntry]
) -> dict[str, TensorEntry]:
    """With offsets into the file. A file that was cut off is found here."""
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise Malformed(f"general.alignment is {alignment}")
    base = -(-cursor.at // alignment) * alignment
    placed = {
        name: TensorEntry(
            shape=entry.shape, type=entry.type, start=base + entry.start, row_bytes=entry.row_bytes
        )
        for name, entry in tensors.items()
    }
    end = max((entry.start + entry.nbytes for entry in placed.values()), default=0)
    if end > len(cursor.data):
        raise Malformed(
            f"it is cut off: {len(cursor.data)} bytes, but its tensors end at byte {end}"
        )
    _check_overlaps(placed)
    return placed


def _check_overlaps(tensors: Mapping[str, TensorEntry]) -> None:
    by_start = sorted(tensors.items(), key=lambda entry: entry[1].start)
    for (first, one), (second, other) in itertools.pairwise(by_start):
        if one.start + one.nbytes > other.start:
            raise Malformed(f"tensors {_shown(first)} and {_shown(second)} overlap")


def _shown(name: str) -> str:
    """A name out of the file, fit for one line."""
    return ascii(name[:80])[1:-1]
