"""llguidance, as far as the worker needs it. Everything that calls it is here.

Masks and acceptance are of tokens; the text is whatever their bytes join to. A grammar is compiled
once, and each sequence has a copy of what that gave, which is cheap: copies share what they learn
about the grammar's lexer. Calls don't raise for grammars and tokens that are wrong: a matcher then
has an error, and keeps it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from services.decode_worker.constraints.formats import with_strict_formats
from services.decode_worker.constraints.grammar import JSON_OPTIONS, Grammar
from services.decode_worker.constraints.known_strings import KnownStrings, OtherTokens
from services.decode_worker.constraints.marked_schema import MarkedSchema, marked
from services.decode_worker.constraints.patterns import KnownPattern, PatternBook
from services.decode_worker.constraints.plain_tokens import PlainTokens
from services.decode_worker.constraints.warming import warm

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = NDArray[np.int32]
MAX_LEXER_STATES: Final = 50_000
"""About 1.5 kB each, of all copies together."""


class Matcher:
    """Where an output stands in its grammar."""

    def __init__(
        self, inner: "LLMatcher", width: int, tokens: "Vocabulary", strings: KnownStrings | None
    ) -> None:
        self._inner = inner
        self._tokens = tokens
        self._strings = strings
        self._given_up = ""
        self.width: Final = width
        """Words of a mask."""
        self.taken_s = 0.0
        """For its last mask."""

    def copy(self) -> "Matcher":
        """At the same place, going its own way from there."""
        strings = None if self._strings is None else self._strings.copy()
        return Matcher(self._inner.deep_copy(), self.width, self._tokens, strings)

    @property
    def error(self) -> str:
        """Why it can't go on; empty if it can."""
        error: str = self._given_up or self._inner.get_error()
        return error

    def give_up(self, reason: str) -> None:
        """Something still works on it in a thread: it is asked for nothing more."""
        self._given_up = reason

    @property
    def warnings(self) -> list[str]:
        """What of the grammar is not held to."""
        found: list[str] = self._inner.get_grammar_warnings()
        return found

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole, and nothing can follow it."""
        return not self.error and bool(self._inner.is_stopped())

    @property
    def may_end(self) -> bool:
        return bool(self._inner.is_accepting())

    def take(self, token: int) -> None:
        """The output goes on by a token; an error if the grammar does not allow it."""
        if not self.error and not self._inner.is_stopped():
            self._inner.consume_token(token)
            if self._strings is not None and not self._strings.take(self._tokens.bytes_of(token)):
                self._strings = None

    def fill(self, words: Words) -> None:
        """Sets int32 [width] to the tokens that may follow, a bit each: bit i % 32 of word i // 32.
        Other Python threads run meanwhile."""
        if words.shape != (self.width,) or not words.flags.c_contiguous:
            raise ValueError(f"a mask of {words.shape}, not ({self.width},)")
        if self._strings is None or not self._strings.fill(words):
            self._inner.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)


class Vocabulary:
    """The tokens of a model, as grammars need them. Made once: it takes 0.7 s, 2 s for 150,000
    tokens, in most of which no other Python thread runs."""

    def __init__(self, tokenizer: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``tokenizer``: what is in ``tokenizer.json``. Raises ValueError for one of a kind whose
        tokens' bytes are not known."""
        from llguidance import LLTokenizer

        try:
            self._tokens: LLTokenizer = LLTokenizer(
                tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids)
            )
        except Exception as error:  # of the library's own kinds
            raise ValueError(str(error).splitlines()[0]) from None
        self.width: Final = -(-vocab_size // 32)
        texts = list(map(self._text_of, range(vocab_size)))
        plain = PlainTokens(texts)
        self._others = OtherTokens(texts, eos_token_ids, plain)
        self._patterns = PatternBook(plain)

    def bytes_of(self, token: int) -> bytes:
        found: bytes = self._tokens.decode_bytes([token])
        return found

    def compile(self, grammar: Grammar, *, quick: bool = True) -> Matcher:
        """At the grammar's beginning, perhaps with an error. Other Python threads run meanwhile.
        ``quick``: its masks are to be made soon, which may take a second and more of processor
        time beforehand (``patterns.BUILD_S``, ``plain_tokens.MOST_WORK``, ``warming.WARM_S``)."""
        found = self._compiled(grammar, quick=quick)
        if quick and not found.error and not warm(found, self._others.single(b'"]},')):
            return self._compiled(grammar, quick=quick)
        return found

    def _compiled(self, grammar: Grammar, *, quick: bool) -> Matcher:
        is_schema = grammar.kind == "json_schema"
        text = with_strict_formats(grammar.text) if is_schema else grammar.text
        inner = _inner(self._tokens, _source(grammar.kind, text))
        schema = marked(text) if is_schema else None
        strings = None
        if schema is not None and self._others.has_marks and not inner.get_error():
            unknown: list[KnownPattern | None] = [None] * len(schema.strings)
            known = self._patterns.known(schema.strings) if quick else unknown
            strings = self._strings(schema, known)
        return Matcher(inner, self.width, self, strings)

    def _strings(
        self, schema: MarkedSchema, known: Sequence[KnownPattern | None]
    ) -> KnownStrings | None:
        inner = _inner(self._others.tokenizer, _source("json_schema", schema.text))
        return (
            None
            if inner.get_error()
            else KnownStrings(self._others, inner, known, asks_unknown=schema.has_unknown)
        )

    def _text_of(self, token: int) -> bytes:
        """Nothing for special tokens and for ids without a token, which the library names so."""
        found = self.bytes_of(token)
        no_text = self._tokens.is_special_token(token) or found == b"<[%d]>" % token
        return b"" if no_text else found


def _source(kind: str, text: str) -> str:
    """As the library reads it; a schema is JSON (``grammar_of``)."""
    from llguidance import LLMatcher

    source: str
    if kind == "json_schema":
        source = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    elif kind == "regex":
        source = LLMatcher.grammar_from_regex(text)
    else:
        source = LLMatcher.grammar_from_lark(text)
    return source


def _inner(tokens: "LLTokenizer", source: str) -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    return LLMatcher(tokens, source, log_level=0, limits=limits)
