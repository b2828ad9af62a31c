"""A digest of what turns text into tokens and chats into text, for two processes to compare."""

from pathlib import Path
from typing import Final

from blake3 import blake3

from precast.errors import ModelCorrupt
from precast.tokenizer.template_files import FILE, TOOL_FILE

_FILES: Final = ("tokenizer.json", "tokenizer_config.json", FILE)


def tokenizer_digest(folder: Path) -> str:
    """BLAKE3 in hex over the folder's tokenizer, its settings and its chat templates. The same for
    the same contents, wherever they are. Raises ``ModelCorrupt`` if one can't be read."""
    digest = blake3()
    for name in (*_FILES, *([TOOL_FILE] if (folder / TOOL_FILE).exists() else [])):
        content = _read(folder / name)
        size = -1 if content is None else len(content)
        digest.update(f"{name}:{size}\n".encode())
        digest.update(content or b"")
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelCorrupt(f"{path}: {error.strerror}") from None
