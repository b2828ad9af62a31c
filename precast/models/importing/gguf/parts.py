"""GGUF files that were split: ``name-00001-of-00003.gguf`` and so on, side by side in a folder.

The first part has the metadata, each part its own tensors. Needs neither numpy nor gguf.
"""

import re
from pathlib import Path
from typing import Final

from precast.errors import ModelNotFound
from precast.models.gguf_index import FILE

_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS: Final = 4096


def part_names(name: str) -> list[str]:
    """Names of all parts of the model that a file belongs to; its own alone if it is whole."""
    if (found := _PART.fullmatch(name)) is None:
        return [name]
    number, count = int(found["number"]), int(found["count"])
    if not 1 <= number <= count <= MAX_PARTS or count == 1:
        return [name]
    return [f"{found['stem']}-{part:05}-of-{count:05}.gguf" for part in range(1, count + 1)]


def find_parts(path: Path) -> list[Path]:
    """All parts of the model that the file belongs to, in order. Raises ``ModelNotFound``."""
    parts = [path.with_name(name) for name in part_names(path.name)]
    if missing := [part for part in parts if not part.is_file()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ModelNotFound(
            f"{missing[0]} is missing{more}: all {len(parts)} parts have to be in one folder"
        )
    return parts


def model_name(name: str) -> str:
    """What the model in a file of this name is called."""
    found = _PART.fullmatch(name)
    return found["stem"] if found and len(part_names(name)) > 1 else name.removesuffix(".gguf")


def stored_names(count: int) -> list[str]:
    """What the parts are called in a model folder."""
    stem = FILE.removesuffix(".gguf")
    return part_names(f"{stem}-00001-of-{count:05}.gguf") if count > 1 else [FILE]
