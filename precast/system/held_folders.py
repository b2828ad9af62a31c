"""A model folder that is replaced while somebody reads it.

An import puts the new folder in the old one's place in one step. The old one stays aside, under a
hidden name, for as long as a process holds it: a worker goes on with what it has started with,
also where it starts a rank again, until it starts again itself.
"""

import ctypes
import errno
import fcntl
import functools
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Final

_REPLACED: Final = ".replaced-"
_NAME: Final = re.compile(r"\.replaced-(.+)-[0-9a-f]{8}")
_AT_FDCWD: Final = -100
_EXCHANGE: Final = 2


def held_folder(folder: Path) -> Path:
    """Where the folder is now that this process, or the one that it was forked from, has asked for
    first; it is kept until the last of them ends. ``folder`` itself if there is none."""
    try:
        now = Path(os.readlink(f"/proc/self/fd/{_held(folder)}"))  # noqa: PTH115  # not a path
    except OSError:
        return folder
    return now if now.is_dir() else folder


def model_name(folder: Path) -> str:
    """The name that the folder has, or had before it was replaced."""
    replaced = _NAME.fullmatch(folder.name)
    return replaced[1] if replaced else folder.name


def replaced_folders(models_dir: Path, name: str) -> list[Path]:
    """Earlier folders of this model that are still there, the latest first."""
    found = [path for path in models_dir.glob(f"{_REPLACED}*") if model_name(path) == name]
    return sorted(found, key=lambda path: path.stat().st_ctime_ns, reverse=True)


def put_in_place(new: Path, target: Path) -> None:
    """``new`` becomes ``target`` in one step; what was there goes aside."""
    if not target.exists():
        new.replace(target)
        return
    aside = target.with_name(f"{_REPLACED}{target.name}-{secrets.token_hex(4)}")
    if _exchange(new, target):
        new.replace(aside)
    else:  # a file system that can't exchange two names
        target.replace(aside)
        new.replace(target)


def remove_unheld(models_dir: Path) -> None:
    """Removes folders that were replaced and that nobody holds any more."""
    for path in models_dir.glob(f"{_REPLACED}*"):
        if path.is_dir() and not _is_held(path):
            shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _held(folder: Path) -> int:
    """A descriptor that is never closed, with a shared lock. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        pass  # being removed, or a file system without locks: it can be read all the same
    return descriptor


def _is_held(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # no locks here: nobody can hold it
    finally:
        os.close(descriptor)
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names. False where the system can't; raises OSError for other reasons."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(*paths, _EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
