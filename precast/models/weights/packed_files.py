"""Packed linears on disk, so that a second start reads what the first one quantised and packed.

A folder for each (checkpoint's content, shard, formats), a safetensors file for each layer in it,
and the files' digests, which are checked before a file is used; a folder appears in one rename. A
start that is interrupted leaves the layers that it had packed to the next one.
Whatever is wrong with it costs time, never a start. The tensors are copied
into huge pages and not used in place: without those every step took 29 % longer, and the copy is
paid once a start (docs/decisions.md).
"""

import dataclasses
import json
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

from precast.errors import ModelCorrupt
from precast.log import get_logger
from precast.models.layers import Shape
from precast.models.sharding import Shard
from precast.models.weights.checkpoint import weight_files
from precast.models.weights.content import content_digests, file_digest
from precast.ops import providers
from precast.ops.native import PACKING_VERSION
from precast.system.held_folders import model_name
from precast.system.scratch import lasting_folder, scratch_folder, sweep

log = get_logger(__name__)

MAX_KEPT: Final = 8
"""Folders kept for a model; those that were not used for longest go."""
_SCRATCH: Final = ".tmp"
_DIGESTS: Final = "digests.json"
"""By file name, BLAKE3 of each."""
_SOURCES: Final = ".sources"
"""Folder of what is remembered of checkpoints' files."""

Keep = Callable[[str, Mapping[str, Tensor]], None]
"""Takes a file's name and its tensors."""


def packed_path(root: Path, folder: Path, shard: Shard, shape: Shape) -> Path:
    """Where one rank's linears are kept; it depends on all that they depend on. Raises OSError."""
    name, digests = model_name(folder), _weight_digests(root, folder)
    formats = (PACKING_VERSION, providers.active().abi)
    of_weights = {k: v for k, v in dataclasses.asdict(shape).items() if k != "adapters"}
    parts = [sorted(digests), repr(shard), repr(of_weights), formats]
    return root / name / blake3(msgspec.json.encode(parts)).hexdigest()[:32]


def model_content(folder: Path, root: Path) -> str:
    """Digest of a model's configuration and weights, of which ``root`` remembers those that have
    not changed. Raises ModelCorrupt."""
    try:
        parts = [
            (folder / "config.json").read_bytes(),
            *map(str.encode, _weight_digests(root, folder)),
        ]
    except OSError as error:
        raise ModelCorrupt(f"{folder}: weights can't be read: {error}") from None
    return blake3(msgspec.json.encode(parts)).hexdigest()


def _weight_digests(root: Path, folder: Path) -> list[str]:
    """In the order of the files' names. Raises OSError."""
    cache = root / _SOURCES / f"{model_name(folder)}.json"
    return content_digests(weight_files(folder), cache)


class PackedFolder:
    """What an earlier start has left. ``damaged`` once a file was not what was written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digests = self._read_digests()
        self.damaged = not self.digests

    def read(self, name: str) -> dict[str, Tensor]:
        """A file's tensors, mapped; none if it is not there or not what was written."""
        path = self.path / f"{name}.safetensors"
        if path.name not in self.digests:
            return {}
        try:
            if file_digest(path) != self.digests[path.name]:
                raise SafetensorError("it is not what was written")
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            log.warning(
                "packed weights are damaged, packing again", path=str(path), reason=str(error)
            )
            self.damaged = True
            return {}

    def close(self) -> None:
        """Notes a use, or removes what is damaged: the next start writes it anew."""
        if self.damaged:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            _touch(self.path)

    def _read_digests(self) -> dict[str, str]:
        try:
            value = json.loads((self.path / _DIGESTS).read_bytes())
        except (OSError, ValueError) as error:
            log.warning("packed weights can't be read", path=str(self.path), reason=str(error))
            return {}
        return value if isinstance(value, dict) else {}


@contextmanager
def keeping_packed(path: Path) -> Iterator[tuple[PackedFolder | None, Keep]]:
    """Gives what a start that was interrupted has left, and a function that writes a file's
    tensors. The folder appears at the end, unless another process was faster. Writing copies: file
    by file, it adds one file to what is in memory."""
    failed, digests = list[Exception](), dict[str, str]()
    with ExitStack() as stack:
        scratch = path

        def keep(name: str, tensors: Mapping[str, Tensor]) -> None:
            if not failed:
                with _collecting(failed):
                    written = scratch / f"{name}.safetensors"
                    save_file(dict(tensors), written)
                    digests[written.name] = file_digest(written)
                    _write_digests(scratch, digests)

        begun = None
        with _collecting(failed):
            scratch = _begun_folder(path, stack)
            if (scratch / _DIGESTS).is_file():
                begun = PackedFolder(scratch)
                digests |= begun.digests
                log.info("going on with weights that were being packed", layers=len(digests))
        yield begun, keep
        if not failed:
            with _collecting(failed):
                if path.exists():
                    shutil.rmtree(scratch)
                else:
                    scratch.rename(path)
                _prune(path.parent)
        if failed:
            shutil.rmtree(scratch, ignore_errors=True)
            log.warning("packed weights are not kept", path=str(path), reason=str(failed[0]))


def _begun_folder(path: Path, stack: ExitStack) -> Path:
    """Where a folder is written: one that is found again, unless another process writes it now."""
    root = path.parent / _SCRATCH
    root.mkdir(parents=True, exist_ok=True)
    sweep(root, but=path.name)
    try:
        return stack.enter_context(lasting_folder(root / path.name))
    except BlockingIOError:
        return stack.enter_context(scratch_folder(root, "packed"))


def _write_digests(folder: Path, digests: Mapping[str, str]) -> None:
    new = folder / f"{_DIGESTS}.new"
    new.write_text(json.dumps(digests))
    new.replace(folder / _DIGESTS)


@contextmanager
def _collecting(failed: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        failed.append(error)


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError:
        pass  # a volume that is only read


def _prune(root: Path) -> None:
    kept = [path for path in root.iterdir() if path.name != _SCRATCH]
    for path in sorted(kept, key=lambda p: p.stat().st_mtime, reverse=True)[MAX_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
