"""Artifacts in a folder: each in ``<root>/<key>/<version>/``, published by one rename."""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from precast.errors import ArtifactRejected, ConfigError, GraphNotFound, StoreUnavailable
from precast.graphs.artifacts.manifest import (
    GRAPH_FILE,
    MANIFEST_FILE,
    MAX_MANIFEST_BYTES,
    SIGNATURE_FILE,
    Manifest,
    check_graph_file,
    decode_manifest,
)
from precast.graphs.artifacts.signing import MAX_SIGNATURE_FILE_BYTES, Signature
from precast.graphs.artifacts.store import (
    MAX_NOTE_BYTES,
    MAX_PUT_ASIDE,
    MAX_REASON_BYTES,
    ArtifactStore,
    Holding,
    StoredArtifact,
    VersionExists,
    check_key,
    number_of,
)
from precast.graphs.key import is_key
from precast.system.scratch import scratch_folder, sweep

TEMPORARY: Final = ".tmp"
QUARANTINE: Final = ".quarantine"
REASON_FILE: Final = "reason.txt"
NOTE_FILE: Final = "lifecycle.json"
LOCK_S: Final = 5.0
"""Longest wait for another process that changes a note, which takes it milliseconds."""


class DiskStore(ArtifactStore):
    """Artifacts in a folder of a local or shared file system with atomic renames."""

    def __init__(self, root: Path) -> None:
        """Raises ``ConfigError`` if a folder in it is a link that leads elsewhere."""
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        for name in (TEMPORARY, QUARANTINE):
            if (root / name).is_symlink():
                raise ConfigError(f"store {root}: {name} is a symbolic link")

    @property
    def location(self) -> str:
        return str(self.root)

    @property
    def temporary(self) -> Path:
        return self.root / TEMPORARY

    def require_writable(self) -> None:
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise ConfigError(f"store_dir {self.root}: can't be written")

    def sweep(self) -> int:
        return sweep(self.temporary)

    def publish(self, manifest_bytes: bytes, signature: Signature, graph: Path) -> None:
        manifest = decode_manifest(manifest_bytes)
        check_graph_file(graph, manifest)
        with scratch_folder(self.temporary, manifest.key) as scratch:
            folder = scratch / str(manifest.version)
            folder.mkdir()
            shutil.copyfile(graph, folder / GRAPH_FILE)
            (folder / MANIFEST_FILE).write_bytes(manifest_bytes)
            (folder / SIGNATURE_FILE).write_bytes(signature.encode())
            _sync_tree(folder)
            self._rename(folder, manifest)

    def open(self, key: str, version: int = 0) -> StoredArtifact:
        number = version or max(self.versions(key), default=0)
        folder = self._folder(key, number)
        if number <= 0 or not _is_inside(folder, self.root):
            raise GraphNotFound(f"no artifact of graph {key[:64]!r}, version {version}")
        raw = _read_bounded(folder / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        signature = Signature.decode(
            _read_bounded(folder / SIGNATURE_FILE, MAX_SIGNATURE_FILE_BYTES)
        )
        manifest = decode_manifest(raw)
        if (manifest.key, manifest.version) != (key, number):
            raise ArtifactRejected(f"manifest of {key}/{number} is that of another artifact")
        check_graph_file(folder / GRAPH_FILE, manifest)
        return StoredArtifact(
            manifest=manifest,
            manifest_bytes=raw,
            signature=signature,
            graph_path=folder / GRAPH_FILE,
        )

    def read_back(self, key: str, version: int) -> tuple[bytes, Signature]:
        artifact = self.open(key, version)
        return artifact.manifest_bytes, artifact.signature

    def resign(self, key: str, version: int, signature: Signature) -> None:
        folder = self._folder(key, version)
        if not _is_inside(folder, self.root):
            raise GraphNotFound(f"no artifact of graph {key}, version {version}")
        used = folder.stat()
        with scratch_folder(self.temporary, key) as scratch:
            (scratch / SIGNATURE_FILE).write_bytes(signature.encode())
            _sync(scratch / SIGNATURE_FILE)
            (scratch / SIGNATURE_FILE).replace(folder / SIGNATURE_FILE)
        os.utime(folder, ns=(used.st_atime_ns, used.st_mtime_ns))  # this was no use of it
        _sync(folder)

    def versions(self, key: str) -> list[int]:
        return sorted(filter(None, map(number_of, _names(self._key_folder(key)))))

    def last_version(self, key: str) -> int:
        return max([*self.versions(key), *self.put_aside(key)], default=0)

    def published_keys(self) -> list[str]:
        names = [name for name in _names(self.root) if is_key(name)]
        folders = [name for name in names if not (self.root / name).is_symlink()]
        return sorted(name for name in folders if self.versions(name))

    def holdings(self) -> list[Holding]:
        return [
            holding
            for key in self.published_keys()
            for version in self.versions(key)
            if (holding := self._holding(key, version))
        ]

    def touch(self, key: str, version: int) -> None:
        with suppress(FileNotFoundError):
            os.utime(self._folder(key, version))

    def remove(self, key: str, version: int) -> None:
        shutil.rmtree(self._folder(key, version), ignore_errors=True)

    def read_note(self, key: str) -> bytes | None:
        path = self._key_folder(key) / NOTE_FILE
        return _read_bounded(path, MAX_NOTE_BYTES) if path.exists() else None

    def update_note(self, key: str, change: Callable[[bytes | None], bytes | None]) -> None:
        folder = self._key_folder(key)
        folder.mkdir(exist_ok=True)
        with _locked(folder):
            try:
                present = self.read_note(key)
            except ArtifactRejected:
                present = None
            note = change(present)
            if note is not None:
                self._write_note(key, note)

    def put_aside(self, key: str) -> dict[int, str]:
        folder = self.root / QUARANTINE
        numbers = {name: number_of(name.split(".")[1]) for name in self._names_put_aside(key)}
        return {number: _reason(folder / name) for name, number in numbers.items() if number}

    def forget_put_aside(self, key: str, version: int) -> None:
        """Delete what was put aside of a version."""
        for name in self._names_put_aside(key):
            if number_of(name.split(".")[1]) == version:
                shutil.rmtree(self.root / QUARANTINE / name, ignore_errors=True)

    def _names_put_aside(self, key: str) -> list[str]:
        """Of the folders; of several for one version the newest is the last."""
        wanted = f"{self._key_folder(key).name}."
        return sorted(n for n in _names(self.root / QUARANTINE) if n.startswith(wanted))

    def keys_put_aside(self) -> set[str]:
        """Keys of which ``put_aside`` knows a version."""
        return {name.split(".")[0] for name in _names(self.root / QUARANTINE)}

    def quarantine(self, key: str, version: int, reason: str) -> None:
        aside = self.root / QUARANTINE
        aside.mkdir(exist_ok=True)
        target = aside / f"{key}.{version}.{time.time_ns()}"
        try:
            self._folder(key, version).rename(target)
        except FileNotFoundError:
            return
        if target.is_symlink():  # what it leads to is not ours to write into
            target.unlink()
            target.mkdir()
        (target / REASON_FILE).write_text(reason[:MAX_REASON_BYTES] + "\n")
        _drop_oldest(aside, MAX_PUT_ASIDE)

    def _write_note(self, key: str, note: bytes) -> None:
        folder = self._key_folder(key)
        with scratch_folder(self.temporary, key) as scratch:
            (scratch / NOTE_FILE).write_bytes(note)
            _sync(scratch / NOTE_FILE)
            (scratch / NOTE_FILE).replace(folder / NOTE_FILE)
        _sync(folder)

    def _key_folder(self, key: str) -> Path:
        folder = self.root / check_key(key)
        if folder.is_symlink():
            raise GraphNotFound(f"graph {key} is a link out of the store")
        return folder

    def _folder(self, key: str, version: int) -> Path:
        return self._key_folder(key) / str(version)

    def _holding(self, key: str, version: int) -> Holding | None:
        folder = self._folder(key, version)
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            used_at = folder.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):  # removed meanwhile
            return None
        return Holding(key=key, version=version, size=size, used_at=used_at)

    def _rename(self, folder: Path, manifest: Manifest) -> None:
        target = self._folder(manifest.key, manifest.version)
        target.parent.mkdir(exist_ok=True)
        try:
            # rename(2) replaces a folder only if it is empty, so a published one is safe
            folder.rename(target)
        except OSError as error:
            if target.is_dir():
                raise VersionExists(f"{manifest.key}/{manifest.version}") from None
            raise error
        _sync(target.parent)
        _sync(self.root)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among processes. Raises ``StoreUnavailable`` if that takes too long."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    end = time.monotonic() + LOCK_S
    try:
        while not _try_lock(descriptor):
            if time.monotonic() > end:
                raise StoreUnavailable(f"{folder} is locked by another process for {LOCK_S:g} s")
            time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _names(folder: Path) -> Iterator[str]:
    try:
        yield from [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return


def _reason(folder: Path) -> str:
    """Why a folder was put aside; "" if its maker was killed before it could write that."""
    try:
        return (folder / REASON_FILE).read_text().strip()
    except OSError:
        return ""


def _is_inside(folder: Path, root: Path) -> bool:
    """A folder that really lies under ``root``, not one that a symbolic link leads to."""
    return folder.is_dir() and folder.resolve().is_relative_to(root.resolve())


def _read_bounded(path: Path, limit: int) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise ArtifactRejected(f"{path.name} of {path.parent.parent.name} is missing")
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise ArtifactRejected(f"{path.name} of {path.parent.parent.name} exceeds {limit} bytes")
    return raw


def _sync_tree(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _drop_oldest(folder: Path, keep: int) -> None:
    paths = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in paths[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
