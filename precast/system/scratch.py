"""Temporary folders that a killed process can't leave behind for good.

Each folder is locked (``flock`` on the folder itself) for as long as its maker lives; the kernel
drops the lock with the process. ``sweep`` removes the folders that nobody holds, so it may run at
any time, also beside other processes that use the same root.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - what is made there has random names


def scratch_root() -> Path:
    """Where temporary files can be written: in shared memory where no disk can be."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return SHARED_MEMORY


@contextmanager
def scratch_folder(root: Path, prefix: str) -> Iterator[Path]:
    """A new, locked folder under ``root``; what is left of it at the end is removed."""
    root.mkdir(parents=True, exist_ok=True)
    folder, descriptor = _make_locked(root, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def lasting_folder(folder: Path) -> Iterator[Path]:
    """A locked folder that the next process finds again, as this one leaves it. Raises
    BlockingIOError at once if another process has it."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(descriptor)


def sweep(root: Path, but: str = "") -> int:
    """Remove what dead processes left under ``root``, a folder of the name ``but`` excepted; the
    number of folders removed."""
    if not root.is_dir():
        return 0
    return sum(_remove_if_abandoned(path) for path in root.iterdir() if path.name != but)


def _make_locked(root: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=root))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.is_dir():  # else a sweep came between mkdir and lock
            return folder, descriptor
        os.close(descriptor)


def _remove_if_abandoned(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        shutil.rmtree(path, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)
