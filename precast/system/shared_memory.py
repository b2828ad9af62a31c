"""Names of shared-memory segments, and the removal of those that nobody will ever use.

A segment's name goes as soon as all ranks of its group have joined, so one that is still in
/dev/shm belongs to a group that is starting, or to one whose processes were killed while it did.
"""

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Final

FOLDER: Final = Path("/dev/shm")  # noqa: S108 - where shm_open puts its files
_NAME: Final = re.compile(r"^precast-(\d+)-(\d+)-\d+$")
_FOREIGN_S: Final = 300.0
"""Age at which a segment of another PID namespace (a container that shares /dev/shm) is a leftover:
its owner can't be looked up from here."""


def new_segment_name() -> str:
    """A name that no other group on this host has; it tells who made it."""
    return f"precast-{_pid_namespace()}-{os.getpid()}-{time.monotonic_ns()}"


def remove_segment(name: str) -> None:
    """Removes a segment's name, if it is still there."""
    with contextlib.suppress(OSError):
        (FOLDER / name).unlink()


def sweep_segments() -> int:
    """Removes segments whose maker is dead; returns how many."""
    removed = 0
    for path in FOLDER.glob("precast-*"):
        match = _NAME.match(path.name)
        with contextlib.suppress(OSError):
            if match is not None and _is_leftover(path, int(match[1]), int(match[2])):
                path.unlink()
                removed += 1
    return removed


def _is_leftover(path: Path, namespace: int, pid: int) -> bool:
    if namespace == _pid_namespace():
        return not Path(f"/proc/{pid}").exists()
    return time.time() - path.stat().st_mtime > _FOREIGN_S


def _pid_namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino
