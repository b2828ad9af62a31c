"""JSON files of a model folder."""

import json
from pathlib import Path
from typing import Any, Final

from precast.errors import ModelCorrupt
from precast.system.pointer import refuse_pointer

_MAX_BYTES: Final = 16 << 20
"""The largest index of safetensors has 9 MB; a list of empty lists takes 30 times its text."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ``ModelCorrupt`` with one line."""
    refuse_pointer(path)
    try:
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ModelCorrupt(f"{path}: {size >> 20} MiB, more than {_MAX_BYTES >> 20}")
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ModelCorrupt(f"{path}: nested too deeply") from None
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(value, dict):
        raise ModelCorrupt(f"{path}: expected a JSON object")
    return value
