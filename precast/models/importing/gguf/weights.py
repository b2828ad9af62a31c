"""Where a model's tensors are in a GGUF file, once they are known to be sound."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.gguf_index import IndexedTensor
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.parts import stored_names
from precast.models.importing.gguf.tensors import Wanted
from precast.ops.gguf_types import BLOCKS, GgufType

_CHUNK: Final = 8 << 20
"""Bytes that are looked at together."""
_NUMBERS: Final = {GgufType.F32: "<f4", GgufType.F16: "<f2"}

Block = np.ndarray[Any, Any]


def index_of(file: GgufFile, wanted: Sequence[Wanted]) -> dict[str, IndexedTensor]:
    """Each tensor's place. Raises ``UnsupportedArchitecture`` for types that can't be read."""
    return {tensor.name: _place(file, tensor) for tensor in wanted}


def check_numbers(file: GgufFile, wanted: Sequence[Wanted]) -> None:
    """Raises ``ModelCorrupt`` for a tensor with numbers or scales that are not finite."""
    sources = (name for tensor in wanted for name in (tensor.source, tensor.odd) if name)
    for name in dict.fromkeys(sources):
        kind = _type(file, name)
        if not all(_finite(kind, rows) for rows in _rows(file, name)):
            raise ModelCorrupt(f"{file.path}: tensor {name} has values that are not finite")


def _place(file: GgufFile, tensor: Wanted) -> IndexedTensor:
    if tensor.source is None:
        return IndexedTensor(shape=tensor.shape)
    entry = file.tensors[tensor.source]
    odd = file.tensors[tensor.odd] if tensor.odd else None
    names = stored_names(file.parts)
    return IndexedTensor(
        shape=tensor.shape,
        file=names[entry.part],
        type=_type(file, tensor.source),
        start=entry.start + tensor.first_row * entry.row_bytes,
        heads=tensor.heads,
        less_one=tensor.less_one,
        odd_file=names[odd.part] if odd else "",
        odd_start=odd.start if odd else 0,
    )


def _type(file: GgufFile, name: str) -> GgufType:
    kind = file.tensors[name].type
    try:
        return GgufType(int(kind))
    except ValueError:
        raise UnsupportedArchitecture(
            f"{file.path}: tensor {name} has type {kind.name}, which can't be read"
        ) from None


def _rows(file: GgufFile, name: str) -> Iterator[Block]:
    entry = file.tensors[name]
    count, step = entry.nbytes // entry.row_bytes, max(1, _CHUNK // entry.row_bytes)
    for first in range(0, count, step):
        yield file.rows(name, first, min(first + step, count))
        file.forget(name, first, min(first + step, count))


def _finite(kind: GgufType, rows: Block) -> bool:
    if kind in _NUMBERS:
        return bool(np.isfinite(rows.view(_NUMBERS[kind])).all())
    if kind is GgufType.BF16:
        return bool(((rows.view("<u2") & 0x7F80) != 0x7F80).all())
    blocks = rows.reshape(-1, BLOCKS[kind].nbytes)
    if kind is GgufType.MXFP4:
        return bool((blocks[:, 0] != 255).all())
    highest = (blocks[:, at + 1] & 0x7C for at in BLOCKS[kind].scales)
    return all(bool((bits != 0x7C).all()) for bits in highest)
