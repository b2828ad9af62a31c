"""Reads a model folder's ``tokenizer.json``. Needs neither torch nor transformers."""

from pathlib import Path

from tokenizers import Tokenizer

from precast.errors import ModelCorrupt
from precast.system.pointer import refuse_pointer


def load_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, which neither cuts nor pads, whatever the file says: a fine-tune's
    file often has the settings of its training. Raises ``ModelCorrupt`` if it is missing or
    unreadable."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelCorrupt(f"{folder}: tokenizer.json is missing")
    refuse_pointer(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ModelCorrupt(f"{path}: {str(error).splitlines()[0]}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
