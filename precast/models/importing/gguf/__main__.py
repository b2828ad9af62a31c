"""``python -m precast.models.importing.gguf FILE FOLDER MEMORY_BYTES``: the importer's child that
converts a GGUF file."""

import sys
from pathlib import Path

from precast.models.importing.child import run
from precast.models.importing.gguf.convert import convert


def main(source: str, target: str, memory_bytes: str) -> int:
    """The process' exit code."""
    path = Path(source)
    return run(path, int(memory_bytes), lambda report: convert(path, Path(target), report))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
