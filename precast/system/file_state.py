"""Whether files have changed since they were read."""

from collections.abc import Iterable
from pathlib import Path

FileState = tuple[int, ...]


def file_state(paths: Iterable[Path]) -> FileState:
    """Changes with the files; empty while one is away."""
    try:
        files = [path.stat() for path in paths]
    except OSError:
        return ()
    return tuple(n for file in files for n in (file.st_mtime_ns, file.st_size, file.st_ino))
