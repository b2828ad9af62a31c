"""``python -m precast.models.importing.check_folder FOLDER MEMORY_BYTES``: the importer's child
that reads a folder's headers and all of its tokenizer."""

import sys
from pathlib import Path

from precast.models.importing.catalog import check_model
from precast.models.importing.child import Report, run
from precast.tokenizer.model_tokenizer import read_model_tokenizer


def main(folder: str, memory_bytes: str) -> int:
    """The process' exit code."""
    path = Path(folder)

    def check(_report: Report) -> None:
        check_model(path)
        read_model_tokenizer(path)

    return run(path, int(memory_bytes), check)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
