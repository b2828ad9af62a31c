"""Masks within strings of which a schema gives a pattern or a length, in a tenth of the time.

llguidance looks at each token that may stand there, and that may be most of them. But which *plain*
tokens may depends on nothing but the string's pattern, and how far it has come: an automaton has a
mask for each of its states (``plain_tokens``). The others, tokens with a quote in them above all,
are asked of a second matcher, whose vocabulary has no plain tokens but single bytes. Its schema
tells which patterns a string may have that begins (``marked_schema``).
"""

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from services.decode_worker.constraints.automata import DEAD, START
from services.decode_worker.constraints.json_text import JsonText
from services.decode_worker.constraints.marked_schema import FREE, MARKS, UNKNOWN, mark, mark_of
from services.decode_worker.constraints.patterns import KnownPattern
from services.decode_worker.constraints.plain_tokens import PlainTokens, Words

if TYPE_CHECKING:
    from llguidance import LLMatcher

_NEVER: Final = re.compile(rb'[^"\\]*[\x00-\x1f\x7f]')
"""Begins what may stand nowhere in a string, nor end one."""
_CONTINUED: Final = bytes(range(0x80, 0xC0))
"""Bytes behind a character's first one."""
_FIRST_BYTE: Final = FREE.encode()[0]
_LIKE_MARKS: Final = re.compile(rb"\xf4(?:\x8f(?:\xa0|\Z)|\Z)")
"""Has one in it, or ends as one begins."""
_MARKS: Final = re.compile("|".join(map(mark, range(MARKS))).encode())
_SAME_BYTE: Final = (0x100000, 0x10FFFF)
"""Characters that begin with it, as marks do."""


class OtherTokens:
    """The vocabulary of second matchers: single bytes, and what is not plain."""

    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int], plain: PlainTokens) -> None:
        from llguidance import LLTokenizer

        kept = list(_kept(tokens, plain.lengths.tolist()))
        self.tokenizer: LLTokenizer = LLTokenizer(
            _wrapped(kept, ends), n_vocab=len(tokens), eos_token=list(ends), slices=[]
        )
        self._byte = _bytes_in(kept)
        self.first_byte: Final = self._byte.get(_FIRST_BYTE, 0)
        """The token of the byte that marks begin with."""
        self.has_marks: Final = self._spells_marks() and not any(
            _LIKE_MARKS.search(token) for token in kept if len(token) > 1
        )
        """Whether marks can be spelled, and only by single bytes."""

    def _spells_marks(self) -> bool:
        return self._byte.keys() >= set("".join(map(mark, range(MARKS))).encode())

    def single(self, text: bytes) -> list[int]:
        """The tokens of its bytes, of those that have one."""
        return [self._byte[byte] for byte in text if byte in self._byte]

    def spelled(self, text: bytes) -> list[int]:
        """As tokens of a byte. Raises ``KeyError`` if there is none for one."""
        return [self._byte[byte] for byte in text]


class KnownStrings:
    """A second matcher, at the same place as the first."""

    def __init__(
        self,
        tokens: OtherTokens,
        inner: "LLMatcher",
        patterns: Sequence[KnownPattern | None],
        *,
        asks_unknown: bool,
    ) -> None:
        """``patterns``: for each that a string may have; None for one that is not known.
        ``asks_unknown``: whether strings may be something else."""
        self._tokens = tokens
        self._inner = inner
        self._patterns = patterns
        self._signs = (FREE, UNKNOWN) if asks_unknown else (FREE,)
        """Marks of strings that no pattern is known of."""
        self._text = JsonText()
        self._last = b""
        """Bytes that a mark may have begun with."""
        self._states: dict[int, int] = {}
        """Of the patterns that the string may have in which it stands."""
        self._read = 0
        """Bytes of that string that they have read."""

    def copy(self) -> "KnownStrings":
        asks_unknown = UNKNOWN in self._signs
        inner = self._inner.deep_copy()
        other = KnownStrings(self._tokens, inner, self._patterns, asks_unknown=asks_unknown)
        other._text, other._last = self._text.copy(), self._last
        other._states, other._read = dict(self._states), self._read
        return other

    def take(self, text: bytes) -> bool:
        """Whether it can go on. Behind a mark that the output has of its own it can't: it is there
        for a whole string in one matcher, and for a character in the other."""
        if _MARKS.search(self._last + text):
            return False
        self._last = (self._last + text)[-3:]
        for piece, begins in self._text.opening(text):
            try:
                taken = bool(self._inner.consume_tokens(self._tokens.spelled(piece)))
            except KeyError:
                return False
            if not taken:
                return False
            if begins:
                self._states, self._read = dict.fromkeys(self._begun(), START), 0
        self._follow()
        return True

    def fill(self, words: Words) -> bool:
        """Sets the mask, if the output stands within a string that is known."""
        content = self._text.content
        if content is None or not self._states or self._read < len(content):
            return False
        masks = [
            mask
            for number, state in self._states.items()
            if (mask := self._pattern(number).mask(state)) is not None
        ]
        if len(masks) < len(self._states):
            return False
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._inner.get_error():
            return False
        for mask in masks:
            np.bitwise_or(words, mask, out=words)
        if not content:
            self._without_marks(words)
        return True

    def _pattern(self, number: int) -> KnownPattern:
        found = self._patterns[number]
        assert found is not None
        return found

    def _begun(self) -> list[int]:
        """Patterns that a string may have that begins here; none if it may be something else."""
        if any(map(self._takes, self._signs)):
            return []
        found = [at for at in range(len(self._patterns)) if self._takes(mark_of(at))]
        return [] if any(self._patterns[at] is None for at in found) else found

    def _takes(self, sign: str) -> bool:
        tokens = self._tokens.spelled(sign.encode())
        return bool(self._inner.validate_tokens(tokens) == len(tokens))

    def _follow(self) -> None:
        """Whole characters; up to escapes, which patterns are not followed through."""
        content = self._text.content
        if content is None or self._text.has_escapes:
            self._states = {}
        if not self._states or content is None:
            return
        text = bytes(content[self._read :]).decode(errors="ignore")
        self._read += len(text.encode())
        for sign in text:
            self._states = {
                number: behind
                for number, state in self._states.items()
                if (behind := self._pattern(number).step(state, ord(sign))) != DEAD
            }

    def _without_marks(self, words: Words) -> None:
        """Only marks may begin with their byte, unless patterns allow such characters."""
        at = self._tokens.first_byte
        allowed = any(
            self._pattern(number).step(START, _SAME_BYTE[0]) != DEAD for number in self._states
        )
        if not allowed:
            words.view(np.uint32)[at // 32] &= np.uint32(0xFFFFFFFF ^ (1 << at % 32))


def _kept(tokens: Sequence[bytes], plain: Sequence[int]) -> Iterator[bytes]:
    for token, length in zip(tokens, plain, strict=True):
        may_stand = len(token) == 1 or not (length or _NEVER.match(token) or _is_no_text(token))
        yield token if may_stand else b""


def _is_no_text(token: bytes) -> bool:
    """Whether no text has it: half a character may stand at either end, and nowhere else."""
    whole = token.lstrip(_CONTINUED)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(whole)
    except UnicodeDecodeError:
        return True
    return len(token) - len(whole) > 3


def _bytes_in(tokens: Sequence[bytes]) -> dict[int, int]:
    """Tokens of a single byte."""
    return {token[0]: number for number, token in enumerate(tokens) if len(token) == 1}


def _wrapped(tokens: Sequence[bytes], ends: Sequence[int]) -> Any:
    """As llguidance wants a vocabulary that is no ``tokenizer.json``."""
    from llguidance import TokenizerWrapper

    return TokenizerWrapper(_Tokens(tokens, ends))


class _Tokens:
    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int]) -> None:
        self.tokens = [b"<end>" if at in ends else token for at, token in enumerate(tokens)]
        self.special_token_ids = list(ends)
        self.eos_token_id = ends[0] if ends else 0
        self.bos_token_id: int | None = None
        self._byte = _bytes_in(self.tokens)

    def __call__(self, text: bytes) -> list[int]:
        return [self._byte[byte] for byte in text if byte in self._byte]
