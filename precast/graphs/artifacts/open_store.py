"""The store that a service's settings name."""

from pathlib import Path

from precast.errors import ConfigError
from precast.graphs.artifacts.disk_store import DiskStore
from precast.graphs.artifacts.store import ArtifactStore


def open_store(folder: Path, url: str | None) -> ArtifactStore:
    """The store in ``folder``, or the one at ``url`` with its local copies there.

    Raises ``ConfigError`` if the folder can't be used.
    """
    try:
        if url is None:
            return DiskStore(folder)
        from precast.graphs.artifacts.object_store import ObjectStore  # loads a native library

        return ObjectStore(url, folder)
    except OSError as error:
        raise ConfigError(f"store_dir {folder}: {error.strerror}") from None
