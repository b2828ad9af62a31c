"""Keeps what captures that failed leave behind, in a folder with a bound."""

import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from precast.fleet.queue.job import Job
from precast.graphs.capture.verify.failure import FOLDER, Mismatch, read_mismatch, write_factors
from precast.graphs.key import spec_part

MAX_FAILURES_KEPT: Final = 16
MAX_SOURCE_BYTES: Final = 1 << 20
"""Of one generated file; larger ones are left out."""
STDERR_FILE: Final = "stderr.txt"


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Where the rests of a failed capture are, and what they say."""

    host: str
    folder: str
    files: tuple[str, ...]
    at: float
    """Unix seconds."""
    mismatch: Mismatch | None = None
    """Set if the graph was captured, but differs from eager."""

    @property
    def command(self) -> str:
        """Captures and verifies the same graph again, with the same inputs."""
        out = f"{self.folder}/again"
        return f"python -m precast.graphs.capture.entry --out {out} < {self.folder}/factors.json"


@dataclass(frozen=True, kw_only=True)
class Failures:
    """Folders of failed captures, the newest ones."""

    folder: Path

    def keep(self, job: Job, scratch: Path) -> Failure | None:
        """Take the interesting files out of a capture's folder; None if that can't be done.

        These are the step that differed, the last of stderr and the generated code.
        """
        now = time.time()
        target = self.folder / f"{job.key}-{int(now * 1000)}"
        try:
            target.mkdir(parents=True)
            write_factors(target, spec_part(job.factors))
            for path in _interesting(scratch):
                shutil.copyfile(path, target / path.name)
            self._drop_oldest()
            files = tuple(sorted(path.name for path in target.iterdir()))
        except OSError:
            return None
        return Failure(
            host=socket.gethostname(),
            folder=str(target),
            files=files,
            at=now,
            mismatch=read_mismatch(scratch),
        )

    def _drop_oldest(self) -> None:
        folders = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime)
        for path in folders[:-MAX_FAILURES_KEPT]:
            shutil.rmtree(path, ignore_errors=True)


def _interesting(scratch: Path) -> list[Path]:
    rests = [*scratch.glob(f"{FOLDER}/*"), *scratch.glob("*.cpp"), scratch / STDERR_FILE]
    return [
        path
        for path in rests
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= _limit(path)
    ]


def _limit(path: Path) -> int:
    return MAX_SOURCE_BYTES if path.suffix in (".cpp", ".txt") else 16 * MAX_SOURCE_BYTES
