"""Probabilities of tokens as OpenAI's JSON.

Entries of different tokens stay apart even where their texts are equal, and the bytes of an
answer's tokens, joined, are the bytes of its text.
"""

import codecs
from collections.abc import Iterable, Sequence

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.openai import responses as api

_Token = pb.TokenLogprob | pb.TopLogprob


class TextOffsets:
    """Where tokens begin in a choice's text, in characters."""

    def __init__(self, before: int) -> None:
        """``before``: characters in front of the first token."""
        self._characters = before
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token: pb.TokenLogprob) -> int:
        """The token's offset. Tokens that are parts of one character have that character's."""
        offset = self._characters
        self._characters += len(self._utf8.decode(token.token_bytes))
        return offset


def completion_logprobs(
    tokens: Sequence[pb.TokenLogprob], offsets: TextOffsets
) -> api.CompletionLogprobs | None:
    if not tokens:
        return None
    return api.CompletionLogprobs(
        tokens=[_completion_name(token) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[_top_by_name(token) for token in tokens],
        text_offset=[offsets.advance(token) for token in tokens],
    )


def prompt_logprobs(tokens: Sequence[pb.TokenLogprob]) -> api.CompletionLogprobs | None:
    """Of a whole prompt, whose first token follows nothing."""
    shown = completion_logprobs(tokens, TextOffsets(0))
    if shown is None:
        return None
    return api.CompletionLogprobs(
        tokens=shown.tokens,
        token_logprobs=[None, *shown.token_logprobs[1:]],
        top_logprobs=[None, *shown.top_logprobs[1:]],
        text_offset=shown.text_offset,
    )


def prompt_logprobs_by_id(tokens: Sequence[pb.TokenLogprob]) -> api.PromptLogprobs:
    """Of a whole prompt, as vLLM shows it."""
    return [_by_id(token) if at else None for at, token in enumerate(tokens)]


def _by_id(token: pb.TokenLogprob) -> dict[str, api.PromptLogprob]:
    """The token itself first."""
    ranks = {other.token_id: rank for rank, other in enumerate(token.top, 1)}
    shown: list[_Token] = [
        token,
        *(other for other in token.top if other.token_id != token.token_id),
    ]
    return {
        str(one.token_id): api.PromptLogprob(
            logprob=one.logprob, rank=ranks.get(one.token_id), decoded_token=one.text
        )
        for one in shown
    }


def joined(
    first: api.CompletionLogprobs | None, second: api.CompletionLogprobs | None
) -> api.CompletionLogprobs | None:
    """Of a prompt and its answer."""
    if first is None or second is None:
        return first or second
    return api.CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def chat_logprobs(tokens: Iterable[pb.TokenLogprob]) -> api.ChatLogprobs | None:
    content = [
        api.ChatLogprob(
            token=_chat_name(token),
            logprob=token.logprob,
            bytes=_bytes(token),
            top_logprobs=[
                api.TopLogprob(token=_chat_name(top), logprob=top.logprob, bytes=_bytes(top))
                for top in token.top
            ],
        )
        for token in tokens
    ]
    return api.ChatLogprobs(content=content) if content else None


def _top_by_name(token: pb.TokenLogprob) -> dict[str, float]:
    """The alternatives, likeliest first; the chosen token is always among them, as with OpenAI.

    The likeliest token of several with one text has it as its name, the others have their ids.
    """
    listed: list[_Token] = list(token.top)
    if all(other.token_id != token.token_id for other in token.top):
        listed.append(token)
    named: dict[str, float] = {}
    for entry in listed:
        name = _completion_name(entry)
        named[name if name not in named else f"token_id:{entry.token_id}"] = entry.logprob
    return named


def _completion_name(token: _Token) -> str:
    r"""Its text; ``bytes:\xf0\x9f`` for a part of a character."""
    escaped = _escaped(token)
    return token.text if escaped is None else f"bytes:{escaped}"


def _chat_name(token: _Token) -> str:
    escaped = _escaped(token)
    return token.text if escaped is None else escaped


def _escaped(token: _Token) -> str | None:
    r"""``\xf0\x9f`` for bytes that are no text, else None."""
    try:
        token.token_bytes.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in token.token_bytes)
    return None


def _bytes(token: _Token) -> list[int] | None:
    """None for a special token, which is no part of the text."""
    return list(token.token_bytes) if token.HasField("token_bytes") else None
