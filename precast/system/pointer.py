"""Git LFS pointers: what a clone without LFS has in place of large files."""

from pathlib import Path
from typing import Final

from precast.errors import ModelCorrupt

_BEGINNING: Final = b"version https://git-lfs.github.com/spec/"


def refuse_pointer(path: Path) -> None:
    """Raises ``ModelCorrupt`` if the file is a pointer and not what it stands for."""
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_BEGINNING))
    except OSError as error:
        raise ModelCorrupt(f"{path}: {error.strerror}") from None
    if beginning == _BEGINNING:
        raise ModelCorrupt(f"{path}: a Git LFS pointer and not the file itself; run `git lfs pull`")
