"""A copy of a file in memory that nobody can change, for processes that read it again and again.

A path may lead to other bytes the second time it is opened. Whoever has copied a file so gives the
same ones to all of its children, those that it starts again included.
"""

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from typing import Final

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SealedFile:
    """A file in memory. It lives as long as this object."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over."""
        self.path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        """For this process and its children, of the same user."""
        self.close = weakref.finalize(self, os.close, descriptor)


def sealed_copy(path: Path, name: str) -> SealedFile:
    """``name``: to be known by in lists of open files. Raises OSError."""
    descriptor = os.memfd_create(f"precast-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    sealed = SealedFile(descriptor)
    with path.open("rb") as source, os.fdopen(os.dup(descriptor), "wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    return sealed
