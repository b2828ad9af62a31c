"""Words that must not turn up, as vLLM has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from services.gateway.openai.errors import invalid
from services.gateway.openai.lengths import LimitedTokenizer

_MAX_TOKENS: Final = 1 << 13
"""Of all words of several tokens; workers take no more."""


@dataclass(frozen=True, kw_only=True)
class Banned:
    tokens: Sequence[int] = ()
    """Not drawn at all."""
    sequences: Sequence[Sequence[int]] = ()
    """Of each, the last token is not drawn behind the others."""


NOTHING_BANNED: Final = Banned()


async def banned_tokens(words: Sequence[str], tokenizer: LimitedTokenizer) -> Banned:
    """The tokens of the words, each with and without a blank in front of it.

    Raises ``ApiError`` 400 for a word without tokens, and for too many of them.
    """
    bare = [word.lstrip() for word in words]
    texts = [*bare, *(f" {word}" for word in bare)]
    found = await tokenizer.encode(texts, "bad_words", add_special_tokens=False)
    empty = next((word for word, ids in zip(words, found, strict=False) if not ids), None)
    if empty is not None:
        raise invalid(f"Invalid 'bad_words': {empty!r} has no tokens.", "bad_words")
    several = sorted({tuple(ids) for ids in found if len(ids) > 1})
    if (count := sum(map(len, several))) > _MAX_TOKENS:
        reason = f"they have {count} tokens; at most {_MAX_TOKENS}"
        raise invalid(f"Invalid 'bad_words': {reason}.", "bad_words")
    return Banned(
        tokens=sorted({ids[0] for ids in found if len(ids) == 1}),
        sequences=several,
    )
