"""Files into a model folder: copies of their own, so that nobody else's writing changes a model."""

import fcntl
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from precast.errors import ConfigError

_FICLONE: Final = 0x40049409
"""Shares blocks until one side writes, where the file system can (btrfs, xfs)."""


def copy_file(source: Path, target: Path) -> None:
    """Follows links. Raises OSError."""
    with source.open("rb") as read, target.open("wb") as written:
        try:
            fcntl.ioctl(written.fileno(), _FICLONE, read.fileno())
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, target)


def check_space(folder: Path, files: Iterable[Path]) -> None:
    """Raises ``ConfigError`` if copies of these files would not fit into the folder."""
    check_room(folder, sum(path.stat().st_size for path in files))


def check_room(folder: Path, wanted: int) -> None:
    """Raises ``ConfigError`` if so many bytes would not fit."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise ConfigError(
            f"{folder}: the model takes {wanted >> 20} MiB, {free >> 20} MiB are free there"
        )
