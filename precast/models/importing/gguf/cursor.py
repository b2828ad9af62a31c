"""Numbers, strings and arrays out of a GGUF file's bytes."""

import mmap
import struct
from typing import Any, Final

import numpy as np

_MAX_TEXT: Final = 16 << 20
_SCALARS: Final = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
    7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""The format's numbers of types, as numpy names them."""
_STRING: Final = 8
_ARRAY: Final = 9

Scalar = int | float | bool | str
Value = Scalar | list[str] | np.ndarray[Any, Any]


class Malformed(Exception):
    """What is wrong with the bytes; the file's name is added outside."""


class Cursor:
    """Reads forwards and never beyond the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> int:
        """Moves over ``size`` bytes; returns where they begin."""
        if size > len(self.data) - self.at:
            raise Malformed(f"it ends at byte {len(self.data)} within its header")
        begin, self.at = self.at, self.at + size
        return begin

    def u32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.take(4))[0])

    def u64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.take(8))[0])

    def string(self) -> str:
        size = self.u64()
        if size > _MAX_TEXT:
            raise Malformed(f"a string of {size} bytes at byte {self.at}")
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
            raise Malformed(f"a value of type {kind} at byte {self.at}")
        dtype = np.dtype(_SCALARS[kind])
        begin = self.take(dtype.itemsize * count)
        return np.frombuffer(self.data, dtype, count, begin)
