"""The bytes that each token stands for.

A byte-level or SentencePiece tokenizer maps a token to bytes whatever its neighbours are. Text is
those bytes, joined and decoded, and a part of a character has an exact value. Other tokenizers
(such as WordPiece) only give text, which depends on the token before.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from tokenizers import Tokenizer, pre_tokenizers

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCE_PIECE: Final = frozenset({"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"})

_Rule = Callable[[str], bytes]
"""From a token's name in the vocabulary to its bytes, in the middle of a text."""


class TokenTable:
    """Names and bytes of one tokenizer's tokens. Holds each of them once at most."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._added = {
            token_id: (token.content, token.special)
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._rule = _rule_of(_decoder_of(tokenizer))
        self._anchor: int | None = None
        self._known: dict[int, bytes] = {}
        self.whole_texts: dict[int, str] = {}
        """Of the tokens asked for so far whose bytes are whole characters."""

    @property
    def has_bytes(self) -> bool:
        """Whether a token's bytes are the same after any other token."""
        return self._rule is not None

    def is_special(self, token_id: int) -> bool:
        """Special tokens have a name and no text."""
        return self._added.get(token_id, ("", False))[1]

    def name(self, token_id: int) -> str:
        """The entry of the vocabulary; empty for an id that has none."""
        return self.tokenizer.id_to_token(token_id) or ""

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text; nothing for special tokens and ids without an entry."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
            with suppress(UnicodeDecodeError):
                self.whole_texts[token_id] = known.decode()
        return known

    def shown(self, token_id: int, *, special: bool = False) -> tuple[str, bytes | None]:
        """A token as a report of probabilities shows it: text and bytes; no bytes for one that is
        no part of any text, whose text is its name then. ``special``: special tokens are part."""
        name = self.name(token_id)
        if self.is_special(token_id) or not name:
            return name, name.encode() if special and name else None
        return self.bytes_of(token_id).decode("utf-8", "replace"), self.bytes_of(token_id)

    def _find(self, token_id: int) -> bytes:
        content, special = self._added.get(token_id, ("", False))
        if special or content:  # an added token is matched as it is written, so that is its text
            return b"" if special else content.encode()
        name = self.name(token_id)
        if not name:
            return b""
        return self._after_a_letter(token_id) if self._rule is None else self._rule(name)

    def _after_a_letter(self, token_id: int) -> bytes:
        """Bytes of a token whose text depends on the token before: after a plain one."""
        if self._anchor is None:
            self._anchor = next(iter(self.tokenizer.encode("a", add_special_tokens=False).ids), 0)
        before: str = self.tokenizer.decode([self._anchor])
        both: str = self.tokenizer.decode([self._anchor, token_id])
        return both.removeprefix(before).encode()


def _decoder_of(tokenizer: Tokenizer) -> Mapping[str, Any] | None:
    """The decoder as ``tokenizer.json`` describes it."""
    decoder = tokenizer.decoder
    return None if decoder is None else dict(json.loads(decoder.__getstate__()))


def _rule_of(decoder: Mapping[str, Any] | None) -> _Rule | None:
    """How a token's bytes are found; None where they depend on the tokens around it."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return _byte_level
    if not kinds or not set(kinds) <= _SENTENCE_PIECE:
        return None
    return _sentence_piece(steps)


_FROM_LETTER: Final[dict[str, int]] = {}
"""Byte of each letter of the byte-level alphabet."""


def _byte_level(name: str) -> bytes:
    letters = _FROM_LETTER or _fill_letters()
    if any(letter not in letters for letter in name):
        return name.encode()
    return bytes(letters[letter] for letter in name)


def _fill_letters() -> dict[str, int]:
    """Printable bytes of Latin-1 are their own letters, the others follow from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    own = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    _FROM_LETTER.update({chr(byte): byte for byte in own})
    _FROM_LETTER.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return _FROM_LETTER


def _sentence_piece(steps: list[Mapping[str, Any]]) -> _Rule | None:
    fused = next((at for at, step in enumerate(steps) if step["type"] == "Fuse"), len(steps))
    if any(not _is_local(step, whole=at > fused) for at, step in enumerate(steps)):
        return None
    each = [step for at, step in enumerate(steps) if step["type"] != "Strip" or at < fused]

    def rule(name: str) -> bytes:
        for step in each:
            byte = _BYTE_TOKEN.fullmatch(name) if step["type"] == "ByteFallback" else None
            if byte is not None:
                return bytes([int(byte[1], 16)])
            name = _applied(step, name)
        return name.encode()

    return rule


def _is_local(step: Mapping[str, Any], *, whole: bool) -> bool:
    """Whether a step of a decoder does the same to a token in the middle of any text; ``whole``:
    it works on the text, not on tokens. (Stripping the text's beginning does nothing there.)"""
    if step["type"] == "Strip":
        return not whole or step["stop"] == 0
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and (len(pattern) == 1 or not whole)
    return True


def _applied(step: Mapping[str, Any], name: str) -> str:
    if step["type"] == "Replace":
        return name.replace(step["pattern"]["String"], step["content"])
    if step["type"] == "Metaspace":
        return name.replace(step["replacement"], " ")
    if step["type"] == "Strip":
        return _stripped(name, step["content"], step["start"], step["stop"])
    return name


def _stripped(text: str, letter: str, start: int, stop: int) -> str:
    """Without up to ``start`` and ``stop`` of these letters at its ends."""
    while start and text.startswith(letter):
        text, start = text[len(letter) :], start - 1
    while stop and text.endswith(letter):
        text, stop = text[: -len(letter)], stop - 1
    return text
