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
        """Experts are matrices of their own here."""
        raise ModelCorrupt(f"{self._folder}: tensor {name} {shape} is missing ({index})")

    def _find(self, name: str, shape: tuple[int, ...]) -> IndexedTensor:
        if (tensor := self._tensors.get(name)) is None:
            raise ModelCorrupt(f"{self._folder}: tensor {name} is missing")
        if tensor.shape != shape:
            raise ModelCorrupt(
                f"{self._folder}: tensor {name} has shape {tensor.shape}, not {shape}"
            )
        return tensor

    def _raw(self, tensor: IndexedTensor) -> "RawRows":
        from precast.ops.gguf_blocks import RawRows

        rows = self._mapped(tensor)
        if tensor.heads and len(tensor.shape) == 2:
            rows = rows[_order(tensor)]
        return RawRows(tensor.type, tensor.shape[-1], rows)

    def _mapped(self, tensor: IndexedTensor) -> "Tensor":
        """uint8 [rows, bytes of a row]"""
        import torch

        skip = tensor.start % mmap.ALLOCATIONGRANULARITY
        length = tensor.rows * tensor.row_bytes
        with (self._folder / tensor.file).open("rb") as file:
            # Private, so that torch takes it for writable; nobody writes.
            mapping = mmap.mmap(
                file.fileno(), length + skip, offset=tensor.start - skip, access=mmap.ACCESS_COPY
            )
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=length, offset=skip)
        return flat.view(tensor.rows, tensor.row_bytes)


def _order(tensor: IndexedTensor) -> "Tensor":
    """Where the file has each row: it rotates neighbours, Hugging Face a head's two halves."""
    import torch

    size = tensor.shape[0] // tensor.heads
    row = torch.arange(tensor.shape[0])
    head, within = row // size, row % size
    return head * size + within % (size // 2) * 2 + within // (size // 2)
