"""A GGUF file in a model folder, and where each of the model's tensors is in it.

The import writes the index, under Hugging Face's names: a start reads neither the file's header nor
its vocabulary. Needs no torch.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from precast.errors import ModelCorrupt
from precast.ops.gguf_types import BLOCKS, GgufType, row_bytes

FILE: Final = "model.gguf"
INDEX: Final = "model.gguf.json"
_VERSION: Final = 1
_Stamp = tuple[int, int, int, int]
"""Inode, size and times of the index."""


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
    odd_file: str = ""
    """If it is not empty, every second output of an expert is in another tensor of the same type:
    the first one of these."""
    odd_start: int = 0

    @property
    def columns(self) -> int:
        """Of a row in the file. Experts are [experts, inputs, outputs], their biases [experts,
        outputs]; the file has a row for each output, and a row of biases for each expert."""
        size = self.shape[1 if len(self.shape) == 3 else -1]
        return size // 2 if self.odd_file and len(self.shape) == 2 else size

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.columns)

    @property
    def rows(self) -> int:
        if len(self.shape) == 3:
            return self.shape[0] * self.shape[2] // (2 if self.odd_file else 1)
        return self.shape[0] if len(self.shape) == 2 else 1


class GgufIndex(msgspec.Struct, frozen=True, kw_only=True):
    version: int = _VERSION
    tensors: dict[str, IndexedTensor]


def has_index(folder: Path) -> bool:
    """Whether the folder's weights are in GGUF files."""
    return (folder / INDEX).is_file()


def read_index(folder: Path) -> Mapping[str, IndexedTensor]:
    """By name. Raises ``ModelCorrupt`` for what is no index, or not of the files that are there.

    A start needs it for the configuration, for the check of the folder and for the weights: what
    has not changed is read once.
    """
    path = folder / INDEX
    try:
        found = path.stat()
    except OSError as error:
        raise ModelCorrupt(f"{path}: {error.strerror}") from None
    stamp = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    sizes = tuple((name, _size(folder, name)) for name in _decoded(path, stamp)[1])
    return _checked(path, stamp, sizes)


@functools.lru_cache(maxsize=2)
def _decoded(path: Path, stamp: _Stamp) -> tuple[Mapping[str, IndexedTensor], list[str]]:
    """The tensors, and the files that they are in."""
    del stamp
    try:
        index = msgspec.json.decode(path.read_bytes(), type=GgufIndex)
    except (OSError, msgspec.MsgspecError) as error:
        raise ModelCorrupt(f"{path}: {error}") from None
    if index.version != _VERSION:
        raise ModelCorrupt(f"{path}: version {index.version} is not {_VERSION}")
    return MappingProxyType(index.tensors), files_of(index.tensors)


@functools.lru_cache(maxsize=2)
def _checked(
    path: Path, stamp: _Stamp, sizes: tuple[tuple[str, int], ...]
) -> Mapping[str, IndexedTensor]:
    (tensors, _), known = _decoded(path, stamp), dict(sizes)
    for name, tensor in tensors.items():
        _check(path, name, tensor, known)
    return tensors


def write_index(folder: Path, tensors: dict[str, IndexedTensor]) -> None:
    content = msgspec.json.format(msgspec.json.encode(GgufIndex(tensors=tensors)), indent=1)
    (folder / INDEX).write_bytes(content + b"\n")


def files_of(tensors: Mapping[str, IndexedTensor]) -> list[str]:
    """Names of the files, sorted."""
    named = {name for tensor in tensors.values() for name in (tensor.file, tensor.odd_file)}
    return sorted(named - {""})


def _size(folder: Path, name: str) -> int:
    if Path(name).name != name:
        raise ModelCorrupt(f"{folder / INDEX}: {ascii(name)[:80]} is no name of a file")
    try:
        return (folder / name).stat().st_size
    except OSError:
        raise ModelCorrupt(f"{folder}: {name} is missing, but {INDEX} names it") from None


def _check(path: Path, name: str, tensor: IndexedTensor, sizes: dict[str, int]) -> None:
    shown, shape = ascii(name)[1:-1][:80], tensor.shape
    uneven = bool(tensor.odd_file) and (len(shape) == 1 or shape[-1] % 2 != 0)
    if not 1 <= len(shape) <= 3 or min(shape) < 1 or uneven:
        raise ModelCorrupt(f"{path}: tensor {shown} has shape {shape}")
    if tensor.columns % BLOCKS[tensor.type].inputs:
        raise ModelCorrupt(f"{path}: tensor {shown} has shape {shape}")
    if tensor.heads < 0 or (tensor.heads and shape[0] % (2 * tensor.heads)):
        raise ModelCorrupt(f"{path}: tensor {shown} has {tensor.heads} heads")
    for file, start in ((tensor.file, tensor.start), (tensor.odd_file, tensor.odd_start)):
        end = start + tensor.rows * tensor.row_bytes
        if file and (start < 0 or end > sizes[file]):
            raise ModelCorrupt(
                f"{path.parent / file}: it is cut off: {sizes[file]} bytes, but tensor {shown} "
                f"ends at byte {end}"
            )
