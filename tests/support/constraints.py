"""Grammars over small vocabularies, and outputs that follow them."""

import json
from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer

from services.decode_worker.constraints.grammar import Grammar
from services.decode_worker.constraints.matcher import Matcher, Vocabulary, Words
from tests.support.json_schemas import Json


def vocabulary(tokenizer: Tokenizer, end: str, size: int | None = None) -> Vocabulary:
    return Vocabulary(
        tokenizer.to_str(), size or tokenizer.get_vocab_size(), [tokenizer.token_to_id(end)]
    )


def json_grammar(schema: Json) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(schema))


def allowed(matcher: Matcher) -> list[int]:
    """Tokens that may follow."""
    words = np.zeros(matcher.width, dtype=np.int32)
    matcher.fill(words)
    assert not matcher.error
    return set_bits(words)


def set_bits(words: Words) -> list[int]:
    """Their numbers."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found


def accepts(matcher: Matcher, tokens: Iterable[int]) -> bool:
    """Whether masks let these tokens through, one by one, and the output may end behind them."""
    matcher = matcher.copy()
    for token in tokens:
        if token not in allowed(matcher):
            return False
        matcher.take(token)
        assert not matcher.error, "a mask allowed a token that the grammar doesn't"
    return matcher.may_end
