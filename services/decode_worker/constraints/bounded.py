"""Masks within strings whose length is bounded, in a tenth of the time.

llguidance looks at each token that is longer than what is left of the string, and that may be most
of them. Of *plain* tokens, those with nothing in them that JSON would escape, only their length
counts there: they are known beforehand. The others are asked of a second matcher, whose vocabulary
has no plain tokens but single bytes.

That holds for schemas which say nothing but its length of a string that they don't spell out. What
is left is asked of the first matcher, with a character that the schema has nowhere, nor JSON
outside of strings: only such a string takes it, and as often as it is long.
"""

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

Words = NDArray[np.int32]
MOST: Final = 32
"""Characters: where more are left, llguidance itself is quick."""
_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f\x7f]+')
_PROBES: Final = "<>|^`~#@%&*$!?;=()_QZXJKqzxjkw"
_PROBES_BESIDE_FORMATS: Final = "<>"
"""That no string of a known format has."""
_FORMATS: Final = frozenset(
    {
        *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6"),
        *("uuid", "uri"),
    }
)
_MORE: Final = frozenset(
    {"pattern", "patternProperties", "propertyNames", "not", "if", "allOf", "$dynamicRef"}
)
"""Keywords that may ask more of a string than a length."""
_CASES: Final = ("anyOf", "oneOf")
_NO_STRINGS: Final = frozenset({"null", "boolean", "integer", "number"})
"""Types of which no part is a string: two objects may say different things of one property."""


class ShortTokens:
    """The vocabulary of second matchers, and the tokens that it lacks."""

    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int]) -> None:
        """``tokens``: what each adds to a text; nothing for special ones."""
        from llguidance import LLTokenizer

        lengths = np.array([_plain_length(token) for token in tokens])
        sizes = np.array([len(token) for token in tokens])
        lengths[sizes == 1] = 0
        kept = [
            b"" if length else token for token, length in zip(tokens, lengths.tolist(), strict=True)
        ]
        self.tokenizer: LLTokenizer = LLTokenizer(
            _wrapped(kept, ends), n_vocab=len(tokens), eos_token=list(ends), slices=[]
        )
        self.fitting: Final = [_mask((lengths > 0) & (lengths <= left)) for left in range(MOST)]
        """Plain tokens of at most so many characters, a bit each."""
        self._byte = _bytes_in(kept)

    def spelled(self, text: bytes) -> list[int]:
        """As tokens of a byte. Raises ``KeyError`` if there is none for one."""
        return [self._byte[byte] for byte in text]

    def probe(self, schema: str) -> int | None:
        """The token of a character that no string of a schema has; None if strings may be more than
        bounded, or none is."""
        if '"maxLength"' not in schema:
            return None
        parsed = json.loads(schema)
        if not _only_bounded(parsed):
            return None
        letters = set("".join(_texts(parsed)))
        probes = _PROBES_BESIDE_FORMATS if '"format"' in schema else _PROBES
        tokens = (self._byte.get(ord(letter)) for letter in probes if letter not in letters)
        return next((token for token in tokens if token is not None), None)


class BoundedStrings:
    """A second matcher, at the same place as the first."""

    def __init__(self, tokens: ShortTokens, inner: "LLMatcher", probe: int) -> None:
        self._tokens = tokens
        self._inner = inner
        self._probe = probe

    def copy(self) -> "BoundedStrings":
        return BoundedStrings(self._tokens, self._inner.deep_copy(), self._probe)

    def take(self, text: bytes) -> bool:
        """Whether it can go on."""
        try:
            return bool(self._inner.consume_tokens(self._tokens.spelled(text)))
        except KeyError:
            return False

    def fill(self, first: "LLMatcher", words: Words) -> bool:
        """Sets the mask, if the output stands within a string with little left."""
        left = first.validate_tokens([self._probe] * MOST)
        if not 0 < left < MOST:
            return False
        self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._inner.get_error():
            return False
        np.bitwise_or(words, self._tokens.fitting[left], out=words)
        return True


def _plain_length(token: bytes) -> int:
    """Characters of a plain token; 0 of another one."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return 0
    return len(text) if _PLAIN.fullmatch(text) else 0


def _bytes_in(tokens: Sequence[bytes]) -> dict[int, int]:
    """Tokens of a single byte."""
    return {token[0]: number for number, token in enumerate(tokens) if len(token) == 1}


def _mask(tokens: NDArray[np.bool_]) -> Words:
    """[ceil(tokens / 32)]."""
    bits = np.zeros(-(-len(tokens) // 32) * 32, dtype=np.bool_)
    bits[: len(tokens)] = tokens
    return np.packbits(bits, bitorder="little").view(np.int32)


def _only_bounded(part: Any) -> bool:
    """Whether nothing in a schema asks more of a free string than its length."""
    if isinstance(part, list):
        return all(map(_only_bounded, part))
    if not isinstance(part, dict):
        return True
    if _MORE & part.keys() or any(_several_strings(part.get(name)) for name in _CASES):
        return False
    if isinstance(part.get("format"), str) and part["format"] not in _FORMATS:
        return False
    return all(map(_only_bounded, part.values()))


def _several_strings(cases: Any) -> bool:
    """Whether more than one of them may have a string: that may be more than a length."""
    if not isinstance(cases, list):
        return False
    kinds = [case.get("type") if isinstance(case, dict) else None for case in cases]
    return sum(not (isinstance(kind, str) and kind in _NO_STRINGS) for kind in kinds) > 1


def _texts(part: Any) -> Iterator[str]:
    """Names and strings in a JSON value."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, dict):
        for name, value in part.items():
            yield name
            yield from _texts(value)
    elif isinstance(part, list):
        for value in part:
            yield from _texts(value)


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
