"""Bodies of answers. ``msgspec`` structs, because one is encoded for every token."""

from collections.abc import Callable
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType

_encoder: Final = msgspec.json.Encoder()


def encode(body: Struct | dict[str, Any]) -> bytes:
    """JSON as UTF-8."""
    return _encoder.encode(body)


encode_text: Final[Callable[[str], bytes]] = _encoder.encode
"""A JSON string as UTF-8, in its quotes."""


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int
    """Of the prompts' tokens: those that were computed for an earlier request."""


class CompletionTokensDetails(Struct, frozen=True, kw_only=True):
    reasoning_tokens: int
    """Of the answers' tokens: those of the model's reasoning, its marks included; 0 where these are
    no tokens of their own."""


class Usage(Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | UnsetType = UNSET
    """Once the choices have finished."""
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    """Of models that reason."""


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    """None for the first token of a prompt, which follows nothing."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters before each token in the choice's text; parts of one character have the same."""


class PromptLogprob(Struct, frozen=True, kw_only=True):
    """Extension, as vLLM has it."""

    logprob: float
    rank: int | None
    """From 1 on, of a token that is among the likeliest ones."""
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of a prompt: it and the likeliest ones, by id. None for the first, which follows
nothing."""


class CompletionChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | UnsetType = UNSET
    """Extension, as vLLM has it: the stop string that ended the choice, if one did."""
    prompt_token_ids: list[int] | UnsetType = UNSET
    """Extension, with return_token_ids."""
    token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Extension."""


class Completion(Struct, frozen=True, kw_only=True):
    """A whole completion, or one chunk of it."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    """Of model and build."""
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int] | None
    """None for a special token, which is no part of the text."""
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    content: list[ChatLogprob]
    refusal: None = None


class CalledFunction(Struct, frozen=True, kw_only=True):
    name: str
    arguments: str
    """JSON, as the model wrote it."""


class ToolCall(Struct, frozen=True, kw_only=True):
    id: str
    type: str = "function"
    function: CalledFunction


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str | None
    """None beside calls."""
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    """Extension: what the model wrote for itself before its answer."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    stop_reason: str | UnsetType = UNSET
    """Extension, as vLLM has it: the stop string that ended the choice, if one did."""
    token_ids: list[int] | UnsetType = UNSET
    """Extension, with return_token_ids."""


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    """Of model and build."""
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    """Extension, with return_token_ids."""
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET
    """Extension."""


class FunctionDelta(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Struct, frozen=True, kw_only=True):
    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta


class ChatDelta(Struct, frozen=True, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | UnsetType = UNSET
    """Extension, as vLLM has it: the stop string that ended the choice, if one did."""
    token_ids: list[int] | UnsetType = UNSET
    """Extension, with return_token_ids."""


class ChatChunk(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    """Of model and build."""
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    """Extension, in the first chunk."""


class Model(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "precast"
    max_model_len: int
    """Extension: tokens of prompt and completion together."""
    root: str
    """Extension: the model whose weights it has: itself, or its parent."""
    parent: str | UnsetType = UNSET
    """Extension: the model whose adapter it is."""


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]
