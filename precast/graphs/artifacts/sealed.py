"""A verified graph in memory that nobody can change: what was hashed is what is loaded.

A path may lead to other bytes the second time it is opened, and a cache is often shared. So a
worker reads a graph once, into a sealed memory file, compares that with the manifest, and its ranks
load it from there, at each of their starts.
"""

import fcntl
import os
import shutil
import weakref
from pathlib import Path
from typing import Final

from precast.errors import ArtifactRejected
from precast.graphs.artifacts.manifest import Manifest, check_graph_bytes

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class SealedGraph:
    """The memory file of one ``graph.pt2``. It lives as long as this object."""

    def __init__(self, descriptor: int) -> None:
        """Takes the descriptor over."""
        self.path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        """For this process and its children, of the same user."""
        self.close = weakref.finalize(self, os.close, descriptor)


def seal_graph(path: Path, manifest: Manifest) -> SealedGraph:
    """A copy of the file that is what its manifest says, whatever becomes of the file.

    Raises ``ArtifactRejected``. Reads and hashes: call it in a thread.
    """
    descriptor = os.memfd_create(f"precast-{manifest.key}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    sealed = SealedGraph(descriptor)
    try:
        with path.open("rb") as source, os.fdopen(os.dup(descriptor), "wb") as copy:
            if os.fstat(source.fileno()).st_size != manifest.size:
                raise ArtifactRejected(f"{path}: not the {manifest.size} bytes that were signed")
            shutil.copyfileobj(source, copy, 1 << 20)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        check_graph_bytes(sealed.path, manifest)
    except OSError as error:
        raise ArtifactRejected(f"{path}: {error.strerror}") from None
    return sealed
