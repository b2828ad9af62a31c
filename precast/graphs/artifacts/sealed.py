"""A verified graph in memory that nobody can change: what was hashed is what is loaded.

A cache is often shared. So a worker reads a graph once, into a sealed memory file, compares that
with the manifest, and its ranks load it from there, at each of their starts.
"""

from pathlib import Path

from precast.errors import ArtifactRejected
from precast.graphs.artifacts.manifest import Manifest, check_graph_bytes
from precast.system.sealed_file import SealedFile, sealed_copy


def seal_graph(path: Path, manifest: Manifest) -> SealedFile:
    """A copy of the file that is what its manifest says, whatever becomes of the file.

    Raises ``ArtifactRejected``. Reads and hashes: call it in a thread.
    """
    try:
        if path.stat().st_size != manifest.size:
            raise ArtifactRejected(f"{path}: not the {manifest.size} bytes that were signed")
        sealed = sealed_copy(path, manifest.key)
        check_graph_bytes(sealed.path, manifest)
    except OSError as error:
        raise ArtifactRejected(f"{path}: {error.strerror}") from None
    return sealed
