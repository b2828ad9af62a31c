"""Words that must not be drawn, as vLLM has them: as far as they are single tokens."""

from collections.abc import Sequence

from services.gateway.openai.errors import invalid
from services.gateway.openai.lengths import LimitedTokenizer


async def banned_ids(words: Sequence[str], tokenizer: LimitedTokenizer) -> list[int]:
    """Ids of the words, and of those with a blank in front, where that is a token of its own.

    Raises ``ApiError`` 400 for a word of several tokens: of these only the last one could be
    forbidden, and that only behind the others.
    """
    bare = [word.lstrip() for word in words]
    texts = [*bare, *(f" {word}" for word in bare)]
    found = await tokenizer.encode(texts, "bad_words", add_special_tokens=False)
    for word, ids in zip(words, found, strict=False):
        if len(ids) != 1:
            reason = f"{word!r} has {len(ids)} tokens; only words of one token are supported"
            raise invalid(f"Invalid 'bad_words': {reason}.", "bad_words")
    return sorted({ids[0] for ids in found if len(ids) == 1})
