"""Biases of zeros where a model has none: AutoGPTQ writes one for every linear."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from precast.models.weights.checkpoint import weight_files


def zero_biases(folder: Path, names: Collection[str]) -> set[str]:
    """Those of these tensors, whose headers were checked before, that are all zeros. Bytes are
    read as they are: numpy has no bf16."""
    return {
        name
        for path in (weight_files(folder) if names else ())
        for name, content in _contents(path, names)
        if not content.strip(b"\0")
    }


def _contents(path: Path, names: Collection[str]) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
        for name in sorted(header.keys() & set(names)):
            start, stop = header[name]["data_offsets"]
            file.seek(8 + size + start)
            yield name, file.read(stop - start)
