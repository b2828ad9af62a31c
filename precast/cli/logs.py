"""The logs of ``serve``'s children: bounded while they run, and a word when there is no room."""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from precast.log import get_logger

log = get_logger(__name__)

LOG_BYTES: Final = 32 << 20
"""A log that is larger is put aside as ``.1`` and begun again."""
LOOK_S: Final = 5.0
FULL_BYTES: Final = 1 << 20
"""With less room than this a disk counts as full."""
_TAIL_BYTES: Final = 4096


async def keep_logs(present: Callable[[], Sequence[Path]]) -> None:
    """Looks at the logs that there are, and at the disk that they are on, until cancelled."""
    full: set[Path] = set()
    while True:
        paths = present()
        for path in paths:
            with contextlib.suppress(OSError):
                await asyncio.to_thread(bound_log, path)
        for folder in {path.parent for path in paths}:
            _say_if_full(folder, full)
        await asyncio.sleep(LOOK_S)


def bound_log(path: Path) -> None:
    """Puts a log that has grown too large aside, and empties it while its child writes on.

    The child appends, so that it goes on at the beginning. Where there is no room for a copy there
    is none; lines that are written between the copy and the cut are lost. Raises ``OSError``.
    """
    if not path.exists() or path.stat().st_size <= LOG_BYTES:
        return
    aside = path.with_suffix(".log.1")
    try:
        shutil.copyfile(path, aside)
    except OSError:
        aside.unlink(missing_ok=True)
    os.truncate(path, 0)


def _say_if_full(folder: Path, full: set[Path]) -> None:
    """Once when the disk gets full, and once when it has room again."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < FULL_BYTES and folder not in full:
        full.add(folder)
        log.warning(
            "disk full: logs, graphs and models can't be written; serving goes on",
            folder=str(folder),
            free_bytes=free,
        )
    elif free >= 2 * FULL_BYTES and folder in full:
        full.discard(folder)
        log.info("disk has room again", folder=str(folder), free_mb=free >> 20)


def last_line(log_path: Path) -> str:
    """The last line that a child has logged, without a ``precast:`` in front."""
    with log_path.open("rb") as file:
        file.seek(max(0, log_path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return (lines or ["ended without a word"])[-1].removeprefix("precast: ")
