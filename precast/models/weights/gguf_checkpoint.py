"""A GGUF file's tensors: as floats, or as the blocks that they are."""

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Final

from precast.errors import ModelCorrupt
from precast.models.gguf_index import IndexedTensor, read_index
from precast.ops.gguf_types import PLAIN, GgufType

if TYPE_CHECKING:
    from torch import Tensor

    from precast.ops.gguf_blocks import RawRows
    from precast.ops.scaled import Weight

_DTYPES: Final = {
    GgufType.F32: "float32",
    GgufType.F16: "float16",
    GgufType.BF16: "bfloat16",
}


class GgufCheckpoint:
    """The tensors of a model folder, by name.

    Each is mapped for as long as it is used: pages of an open file count as the process's memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors = read_index(folder)

    def get(self, name: str, shape: tuple[int, ...]) -> "Weight":
        """Matrices are as the file has them, whatever their type; others are floats."""
        import torch

        from precast.ops.gguf_blocks import FileWeight, values_of

        tensor = self._find(name, shape)
        if not tensor.file:
            return torch.zeros(shape)
        if tensor.odd_file:
            pair = [values_of(raw) for raw in self._raws(tensor, 0, tensor.rows)]
            return torch.stack(pair, dim=-1).view(shape)
        raw = self._raw(tensor)
        if len(shape) == 2:
            return FileWeight([raw])
        if tensor.type in PLAIN:  # a copy, for the file is not mapped any longer than needed
            found = raw.rows.clone().view(getattr(torch, _DTYPES[tensor.type])).view(shape)
        else:
            found = values_of(raw).view(shape)
        if tensor.heads:
            found = found[_order(tensor)]
        return found.float() - 1 if tensor.less_one else found

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> "Weight":
        """One of the linears in a tensor [experts, inputs, outputs], as [outputs, inputs]."""
        import torch

        from precast.ops.gguf_blocks import FileWeight

        tensor = self._find(name, shape)
        each = tensor.rows // shape[0]
        raws = self._raws(tensor, index * each, each)
        both = torch.stack([raw.rows for raw in raws], dim=1).flatten(0, 1)
        return FileWeight([raws[0]._replace(rows=both)])

    def _find(self, name: str, shape: tuple[int, ...]) -> IndexedTensor:
        if (tensor := self._tensors.get(name)) is None:
            raise ModelCorrupt(f"{self._folder}: tensor {name} is missing")
        if tensor.shape != shape:
            raise ModelCorrupt(
                f"{self._folder}: tensor {name} has shape {tensor.shape}, not {shape}"
            )
        return tensor

    def _raw(self, tensor: IndexedTensor) -> "RawRows":
        [raw] = self._raws(tensor, 0, tensor.rows)
        if tensor.heads and len(tensor.shape) == 2:
            raw = raw._replace(rows=raw.rows[_order(tensor)])
        return raw

    def _raws(self, tensor: IndexedTensor, first: int, count: int) -> "list[RawRows]":
        """Some of its rows, and those that lie between them if these are elsewhere."""
        from precast.ops.gguf_blocks import RawRows

        places = [(tensor.file, tensor.start), (tensor.odd_file, tensor.odd_start)]
        skipped = first * tensor.row_bytes
        return [
            RawRows(
                tensor.type,
                tensor.columns,
                self._mapped(file, start + skipped, count, tensor.row_bytes),
            )
            for file, start in places
            if file
        ]

    def _mapped(self, file: str, start: int, rows: int, row_bytes: int) -> "Tensor":
        """uint8 [rows, bytes of a row]"""
        import torch

        skip = start % mmap.ALLOCATIONGRANULARITY
        length = rows * row_bytes
        with (self._folder / file).open("rb") as opened:
            # Private, so that torch takes it for writable; nobody writes.
            mapping = mmap.mmap(
                opened.fileno(), length + skip, offset=start - skip, access=mmap.ACCESS_COPY
            )
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=length, offset=skip)
        return flat.view(rows, row_bytes)


def _order(tensor: IndexedTensor) -> "Tensor":
    """Where the file has each row: it rotates neighbours, Hugging Face a head's two halves."""
    import torch

    size = tensor.shape[0] // tensor.heads
    row = torch.arange(tensor.shape[0])
    head, within = row // size, row % size
    return head * size + within % (size // 2) * 2 + within // (size // 2)
