"""A GGUF file in a model folder, and where each of the model's tensors is in it.

The import writes the index, under Hugging Face's names: a start reads neither the file's header nor
its vocabulary. Needs no torch.
"""

from pathlib import Path
from typing import Final

import msgspec

from precast.errors import ModelCorrupt
from precast.ops.gguf_types import BLOCKS, GgufType, row_bytes

FILE: Final = "model.gguf"
INDEX: Final = "model.gguf.json"
_VERSION: Final = 1


class IndexedTensor(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of the model; sizes as Hugging Face has them."""

    shape: tuple[int, ...]
    file: str = ""
    """Of the folder; empty: the tensor is zeros."""
    type: GgufType = GgufType.F32
    start: int = 0
    """Byte of the file at which its first row begins."""
    heads: int = 0
    """Rows are this many heads whose halves the file interleaves; 0: rows are in their order."""
    less_one: bool = False
    """Whether the file has 1 more."""

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.shape[-1])

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1


class GgufIndex(msgspec.Struct, frozen=True, kw_only=True):
    version: int = _VERSION
    tensors: dict[str, IndexedTensor]


def has_index(folder: Path) -> bool:
    """Whether the folder's weights are in GGUF files."""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> dict[str, IndexedTensor]:
    """By name. Raises ``ModelCorrupt`` for what is no index, or not of the files that are there."""
    path = folder / INDEX
    try:
        index = msgspec.json.decode(path.read_bytes(), type=GgufIndex)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelCorrupt(f"{path}: {error}") from None
    if index.version != _VERSION:
        raise ModelCorrupt(f"{path}: version {index.version} is not {_VERSION}")
    sizes = {name: _size(folder, name) for name in files_of(index.tensors)}
    for name, tensor in index.tensors.items():
        _check(path, name, tensor, sizes)
    return index.tensors


def write_index(folder: Path, tensors: dict[str, IndexedTensor]) -> None:
    content = msgspec.json.format(msgspec.json.encode(GgufIndex(tensors=tensors)), indent=1)
    (folder / INDEX).write_bytes(content + b"\n")


def files_of(tensors: dict[str, IndexedTensor]) -> list[str]:
    """Names of the files, sorted."""
    return sorted({tensor.file for tensor in tensors.values() if tensor.file})


def _size(folder: Path, name: str) -> int:
    if Path(name).name != name:
        raise ModelCorrupt(f"{folder / INDEX}: {ascii(name)[:80]} is no name of a file")
    try:
        return (folder / name).stat().st_size
    except OSError:
        raise ModelCorrupt(f"{folder}: {name} is missing, but {INDEX} names it") from None


def _check(path: Path, name: str, tensor: IndexedTensor, sizes: dict[str, int]) -> None:
    shown, shape = ascii(name)[1:-1][:80], tensor.shape
    if not 1 <= len(shape) <= 2 or min(shape) < 1 or shape[-1] % BLOCKS[tensor.type].inputs:
        raise ModelCorrupt(f"{path}: tensor {shown} has shape {shape}")
    if tensor.heads < 0 or (tensor.heads and shape[0] % (2 * tensor.heads)):
        raise ModelCorrupt(f"{path}: tensor {shown} has {tensor.heads} heads")
    end = tensor.start + tensor.rows * tensor.row_bytes
    if tensor.file and (tensor.start < 0 or end > sizes[tensor.file]):
        raise ModelCorrupt(
            f"{path.parent / tensor.file}: it is cut off: {sizes[tensor.file]} bytes, but tensor "
            f"{shown} ends at byte {end}"
        )
