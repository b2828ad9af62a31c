"""Writes a GGUF file's tensors as safetensors, some rows at a time."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.tensors import Wanted

_PLAIN: Final = {Type.F32: ("F32", 4), Type.F16: ("F16", 2), Type.BF16: ("BF16", 2)}
"""Types that are taken as they are: safetensors' name and bytes of an element."""
_CHUNK: Final = 8 << 20
"""Elements that are dequantised at once: 32 MiB."""

Block = np.ndarray[Any, Any]


def write_weights(file: GgufFile, wanted: Sequence[Wanted], target: Path) -> None:
    """Quantised tensors become float32, others stay as they are.

    Raises ``ModelCorrupt`` for values that are no numbers, ``UnsupportedArchitecture`` for types
    that can't be read.
    """
    header, total = _header(file, wanted)
    with target.open("wb") as out:
        out.write(header)
        for tensor in wanted:
            for block in _blocks(file, tensor):
                out.write(np.ascontiguousarray(block).data.cast("B"))
        _check_length(out, len(header) + total, target)


def _check_length(out: BinaryIO, expected: int, target: Path) -> None:
    if out.tell() != expected:
        raise AssertionError(f"{target}: {out.tell()} bytes written, not {expected}")


def _header(file: GgufFile, wanted: Sequence[Wanted]) -> tuple[bytes, int]:
    """Safetensors' header, and how many bytes of tensors follow it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in wanted:
        dtype, size = _stored(file, tensor)
        nbytes = int(np.prod(tensor.shape, dtype=np.int64)) * size
        entries[tensor.name] = {
            "dtype": dtype,
            "shape": tensor.shape,
            "data_offsets": [at, at + nbytes],
        }
        at += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def _stored(file: GgufFile, tensor: Wanted) -> tuple[str, int]:
    kind = Type.F32 if tensor.source is None else file.tensors[tensor.source].type
    return _PLAIN.get(kind, ("F32", 4))


def _blocks(file: GgufFile, tensor: Wanted) -> Iterator[Block]:
    """The tensor's rows in order, as arrays of some rows each."""
    if tensor.source is None:
        yield np.zeros(tensor.shape, np.float32)
        return
    rows, columns = tensor.shape if len(tensor.shape) == 2 else (1, tensor.shape[0])
    step = rows // tensor.heads if tensor.heads and rows > 1 else max(1, _CHUNK // columns)
    for first in range(0, rows, step):
        block = _values(file, tensor.source, first, min(first + step, rows))
        yield _as_halves(block, tensor) if tensor.heads else block


def _values(file: GgufFile, name: str, first: int, last: int) -> Block:
    kind = file.tensors[name].type
    raw = file.rows(name, first, last)
    if kind in _PLAIN:
        block: Block = raw.view({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[_PLAIN[kind][0]])
        finite = _finite_bf16(block) if kind is Type.BF16 else bool(np.isfinite(block).all())
    else:
        block = _dequantised(file, name, raw)
        finite = bool(np.isfinite(block).all())
    if not finite:
        raise ModelCorrupt(f"{file.path}: tensor {name} has values that are not finite")
    return block


def _dequantised(file: GgufFile, name: str, raw: Block) -> Block:
    kind = file.tensors[name].type
    try:
        with np.errstate(all="ignore"):
            block: Block = quants.dequantize(raw, kind)
    except NotImplementedError:
        raise UnsupportedArchitecture(
            f"{file.path}: tensor {name} has type {kind.name}, which can't be read"
        ) from None
    return block


def _finite_bf16(bits: Block) -> bool:
    return bool(((bits & 0x7F80) != 0x7F80).all())


def _as_halves(block: Block, tensor: Wanted) -> Block:
    """GGUF rotates neighbours, Hugging Face a head's two halves: puts rows where those are.

    A matrix' block is one head [head_dim, columns]; a bias is all of them, [1, rows].
    """
    heads = tensor.heads if len(tensor.shape) == 1 else 1
    shape = block.shape
    pairs = block.reshape(heads, tensor.shape[0] // tensor.heads // 2, 2, -1)
    return pairs.swapaxes(1, 2).reshape(shape)
