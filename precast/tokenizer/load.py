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
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises bare ones, and panics are no Exceptions
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelCorrupt(f"{path}: {said}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
