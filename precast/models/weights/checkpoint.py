"""A checkpoint's tensors: which files a folder has, and each tensor by its name."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safetensors import safe_open

from precast.errors import ModelCorrupt
from precast.models.gguf_index import INDEX, files_of, has_index, read_index
from precast.models.json_file import read_object

if TYPE_CHECKING:
    from torch import Tensor  # headers are read without it

_INDEX: Final = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those of its index if it has one; or its GGUF files and
    their index. Raises ``ModelCorrupt``."""
    if has_index(folder):
        return [folder / name for name in (*files_of(read_index(folder)), INDEX)]
    index = folder / _INDEX
    if not index.is_file():
        files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
        if not files:
            raise ModelCorrupt(f"{folder}: no .safetensors file")
        return files
    try:
        names = sorted(set(read_object(index)["weight_map"].values()))
    except (ModelCorrupt, KeyError, TypeError, AttributeError):
        raise ModelCorrupt(f"{index}: not an index of safetensors files") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            shown = ascii(name)[:80].strip("'")
            raise ModelCorrupt(f"{folder}: {shown} is missing, but {_INDEX} names it")
    return [folder / name for name in names]


class Checkpoint:
    """The tensors of a folder's safetensors files, by name.

    Each is mapped for as long as it is used: pages of an open file count as the process's memory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))

    @property
    def names(self) -> Collection[str]:
        return self._files.keys()

    def get(self, name: str, shape: tuple[int, ...]) -> "Tensor":
        if name not in self._files:
            raise ModelCorrupt(f"{self._folder}: tensor {name} is missing")
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        tensor = tensor if tensor.dim() else tensor.reshape(1)
        if tuple(tensor.shape) != shape:
            raise ModelCorrupt(
                f"{self._folder}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}"
            )
        return tensor

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> "Tensor":
        """One of the linears in a tensor [experts, inputs, outputs], as [outputs, inputs]."""
        return self.get(name, shape)[index].T
