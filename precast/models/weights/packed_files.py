"""Packed linears on disk, so that a second start reads what the first one quantised and packed.

A folder for each (checkpoint, shard, formats), a safetensors file for each layer in it; a folder
appears in one rename. Whatever is wrong with it costs time, never a start. The tensors are copied
into huge pages and not used in place: without those every step took 29 % longer, and the copy is
paid once a start (docs/decisions.md).
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from precast.log import get_logger
from precast.models.layers import Shape
from precast.models.sharding import Shard
from precast.models.weights.checkpoint import weight_files
from precast.ops import providers
from precast.ops.native import PACKING_VERSION
from precast.system.scratch import scratch_folder, sweep

log = get_logger(__name__)

MAX_KEPT: Final = 8
"""Folders kept for a model; those that were not used for longest go."""
_SCRATCH: Final = ".tmp"

Keep = Callable[[str, Mapping[str, Tensor]], None]
"""Takes a file's name and its tensors."""


def packed_path(root: Path, folder: Path, shard: Shard, shape: Shape) -> Path:
    """Where one rank's linears are kept; it depends on all that they depend on."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weight_files(folder)]
    formats = (PACKING_VERSION, providers.active().abi)
    parts = [files, repr(shard), repr(dataclasses.asdict(shape)), formats]
    return root / folder.name / blake3(msgspec.json.encode(parts)).hexdigest()[:32]


def read_packed(path: Path, name: str) -> dict[str, Tensor]:
    """A file's tensors, mapped; none if it is not there or can't be read."""
    file_path = path / f"{name}.safetensors"
    if not file_path.is_file():
        return {}
    try:
        with safe_open(file_path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        log.warning("packed weights can't be read", path=str(file_path), reason=str(error))
        return {}


@contextmanager
def keeping_packed(path: Path) -> Iterator[Keep]:
    """Gives a function that writes a file's tensors; the folder appears at the end, unless another
    process was faster. Writing copies: file by file, it adds one file to what is in memory."""
    root, failed = path.parent, list[Exception]()
    with ExitStack() as stack:
        scratch = root

        def keep(name: str, tensors: Mapping[str, Tensor]) -> None:
            if not failed:
                with _collecting(failed):
                    save_file(dict(tensors), scratch / f"{name}.safetensors")

        with _collecting(failed):
            sweep(root / _SCRATCH)
            scratch = stack.enter_context(scratch_folder(root / _SCRATCH, "packed"))
        yield keep
        if not failed:
            with _collecting(failed):
                if not path.exists():
                    scratch.rename(path)
                _prune(root)
        if failed:
            log.warning("packed weights are not kept", path=str(path), reason=str(failed[0]))


@contextmanager
def _collecting(failed: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        failed.append(error)


def touch_packed(path: Path) -> None:
    """Notes a use."""
    try:
        path.touch()
    except OSError:
        pass  # a volume that is only read


def _prune(root: Path) -> None:
    kept = [path for path in root.iterdir() if path.name != _SCRATCH]
    for path in sorted(kept, key=lambda p: p.stat().st_mtime, reverse=True)[MAX_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
