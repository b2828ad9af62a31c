"""Token ids that end an answer: all that a model folder's three files say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from precast.models.json_file import read_object


def end_tokens(folder: Path, config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The union of what ``generation_config.json``, ``config.json`` and ``tokenizer_config.json``
    name, in this order. Raises ``ModelCorrupt`` or ValueError for what is no token."""
    generation = _optional(folder / "generation_config.json").get("eos_token_id")
    found = [*_ids(generation, vocab_size), *_ids(config.get("eos_token_id"), vocab_size)]
    token = _of_tokenizer(folder)
    return tuple(dict.fromkeys([*found, *([] if token is None else _ids(token, vocab_size))]))


def _optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _ids(value: Any, vocab_size: int) -> list[int]:
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    for one in ids:
        if not isinstance(one, int) or isinstance(one, bool):
            raise ValueError(f"eos_token_id: {ascii(one)[:40]} is not a token id")
        if not 0 <= one < vocab_size:
            raise ValueError(f"eos_token_id: {one} is no token: vocab_size = {vocab_size}")
    return ids


def _of_tokenizer(folder: Path) -> int | None:
    """The id of ``eos_token``; None if there is none, or no such token."""
    settings = _optional(folder / "tokenizer_config.json")
    token = settings.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        return None
    for number, entry in dict(settings.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and entry.get("content") == text:
            return int(number)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    if (found := _added_token(path, text)) is not None:
        return found
    # imported here: a compile worker reads configurations too and has no tokenizers
    from precast.tokenizer.load import load_tokenizer

    known: int | None = load_tokenizer(folder).token_to_id(text)
    return known


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _AddedTokens(msgspec.Struct):
    added_tokens: list[_AddedToken]


def _added_token(path: Path, text: str) -> int | None:
    """The id of a token that the tokenizer adds to its vocabulary, as those that end an answer
    mostly are: found without making a tokenizer of the file, which takes 0.2 s."""
    try:
        added = msgspec.json.decode(path.read_bytes(), type=_AddedTokens).added_tokens
    except (OSError, msgspec.MsgspecError, RecursionError):
        return None  # whoever makes a tokenizer of it says what is wrong
    return next((token.id for token in added if token.content == text), None)
