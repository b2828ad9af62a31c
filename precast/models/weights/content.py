"""Digests of files, so that what is derived from them is found by content and not by name or date.

A digest is remembered with the file's inode, size and times. The time of change (``ctime``) can't
be set from outside: a file that was replaced or written shows it even where its size and its date
are what they were (``cp -p``, rsync, reproducible builds). Files that changed a moment ago are read
again each time, because a clock's tick may hide a second change.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from precast.log import get_logger

log = get_logger(__name__)

SETTLED_NS: Final = 2 * 10**9
"""Age from which a file's times tell of every change; clocks of file systems tick in milliseconds,
some in seconds."""


_remembered: Final[dict[Path, dict[str, Any]]] = {}
"""What each cache should have; there are as many as models that the process loads."""


def file_digest(path: Path) -> str:
    """BLAKE3 of a file in hex; 3.5 GB/s a core. Raises OSError."""
    if path.stat().st_size == 0:
        return blake3(b"").hexdigest()
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def content_digests(files: Sequence[Path], cache: Path) -> list[str]:
    """The files' digests in order; ``cache`` remembers them, and so does this process where it
    can't be written. Raises OSError for the files only."""
    known = _read(cache) or _remembered.get(cache, {})
    found = [_digest(path, known) for path in files]
    entries = {path.name: entry for path, (_, entry) in zip(files, found, strict=True) if entry}
    if entries != known:
        _write(cache, entries)
    _remembered[cache] = entries
    return [digest for digest, _ in found]


def _digest(path: Path, known: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """A file's digest, and what may be remembered."""
    stamp, now = _stamp(path), time.time_ns()
    entry = known.get(path.name)
    if isinstance(entry, dict) and entry.get("stamp") == stamp:
        return str(entry["digest"]), entry
    digest = file_digest(path)
    settled = now - max(stamp[-2:]) > SETTLED_NS and _stamp(path) == stamp
    return digest, {"stamp": stamp, "digest": digest} if settled else None


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _read(cache: Path) -> dict[str, Any]:
    try:
        value = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _write(cache: Path, entries: dict[str, Any]) -> None:
    scratch = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(entries))
        scratch.replace(cache)
    except OSError as error:
        log.debug("digests are not kept", path=str(cache), reason=str(error))
