"""Reads a model folder's ``tokenizer.json``. Needs neither torch nor transformers."""

from pathlib import Path

from tokenizers import Tokenizer

from precast.errors import ModelCorrupt


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer. Raises ``ModelCorrupt`` if it is missing or unreadable."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelCorrupt(f"{folder}: tokenizer.json is missing")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelCorrupt(f"{path}: {str(error).splitlines()[0]}") from None
