"""Refuses texts that can't fit into a context before they cost anything, and bounds what
tokenising costs.

A text has at least as many tokens as its characters divided by those of the longest token. Where
that leaves a doubt, a long text is counted piece by piece until it is too long.
"""

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from precast.tokenizer.chat_template import PLAIN, ChatOptions
from precast.tokenizer.model_tokenizer import ModelTokenizer
from services.gateway.openai.errors import ApiError, invalid

_PARALLEL: Final = 2
"""Long texts that are tokenised at once; the others wait."""
_LONG_TEXT: Final = 32 << 10
"""Characters from which a text counts as long."""
_PIECE: Final = 64 << 10
"""Characters of a piece."""
_USUAL_TOKEN: Final = 16
"""Characters of a token that texts rarely exceed on average; those that do are looked at twice."""
_SEAM: Final = 16
"""Tokens that a cut between two pieces may add to them."""


class LimitedTokenizer:
    """One model's tokenizer, with the longest context that a worker has, in tokens."""

    def __init__(self, tokenizer: ModelTokenizer, limit: int, gate: asyncio.Semaphore) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._gate = gate

    def check(self, texts: Sequence[str], field: str) -> None:
        """Raises ``ApiError`` 400 if one text alone can't fit."""
        for text in texts:
            least = math.ceil(len(text) / self._tokenizer.longest_token)
            if least > self._limit:
                raise _too_long(self._limit, least, field)

    async def encode(
        self, texts: Sequence[str], field: str, *, add_special_tokens: bool
    ) -> list[list[int]]:
        """Token ids of each text. Raises ``ApiError`` 400 if one is far too long."""
        self.check(texts, field)
        if sum(map(len, texts)) < _LONG_TEXT:
            return await self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)
        async with self._gate:
            for text in texts:
                await self._check_pieces(text, field)
            return await self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions = PLAIN,
        *,
        allow_control_tokens: bool = False,
        add_special_tokens: bool = False,
    ) -> tuple[list[int], str]:
        """Token ids of a chat, and the text that they are of.

        Raises ``InvalidRequest``, or ``ApiError`` 400 if far too long.
        """
        self.check([message["content"] for message in messages], "messages")
        chat = await self._tokenizer.render_chat(
            messages, options, allow_control_tokens=allow_control_tokens
        )
        self.check([chat.text], "messages")
        encode = partial(self._tokenizer.encode_chat, add_special_tokens=add_special_tokens)
        if len(chat.text) < _LONG_TEXT:
            return await encode(chat), chat.text
        async with self._gate:
            if not chat.marked:
                await self._check_pieces(chat.text, "messages")
            return await encode(chat), chat.text

    async def _check_pieces(self, text: str, field: str) -> None:
        """Count a text that is probably too long without ever holding all of its tokens."""
        if len(text) <= _USUAL_TOKEN * self._limit:
            return
        least = 0
        for piece in _pieces(text):
            (ids,) = await self._tokenizer.encode([piece], add_special_tokens=False)
            least += max(0, len(ids) - _SEAM)
            if least > self._limit:
                raise _too_long(self._limit, least, field)


def make_gate() -> asyncio.Semaphore:
    """What the long texts of one gateway pass."""
    return asyncio.Semaphore(_PARALLEL)


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def _too_long(limit: int, least: int, field: str) -> ApiError:
    message = (
        f"This model's maximum context length is {limit} tokens, but the text of '{field}' has at "
        f"least {least}."
    )
    return invalid(message, param=field, code="context_length_exceeded")
