"""``/tokenize`` and ``/detokenize``, as vLLM has them."""

from typing import Any, Self

from msgspec import UNSET, Struct, UnsetType
from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.gateway.openai.fields import MAX_PROMPT_IDS
from services.gateway.openai.generation_fields import TokenId
from services.gateway.openai.messages import MAX_MESSAGES, FieldError, Message
from services.gateway.openai.model_name import ModelName
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.tools.fields import MAX_TOOLS, Tool


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="ignore", frozen=True, use_attribute_docstrings=True
    )

    model: ModelName = Field(default_factory=str)
    """May be left out where one model is served."""


def _one_of_two(schema: dict[str, Any]) -> None:
    schema["oneOf"] = [
        {"required": [given], "properties": {other: {"type": "null"}, given: {"type": kind}}}
        for given, other, kind in (
            ("prompt", "messages", "string"),
            ("messages", "prompt", "array"),
        )
    ]


class TokenizeRequest(_Body):
    """``POST /tokenize``: a text or a chat."""

    model_config = ConfigDict(json_schema_extra=_one_of_two)

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    """true for texts, false for chats."""
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=64)
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "or messages is required, not both")
        return self

    def completion(self) -> CompletionRequest:
        """The request whose prompt this is."""
        assert self.prompt is not None, "it is a chat"
        special = self.add_special_tokens
        return CompletionRequest(model=self.model, prompt=self.prompt, add_special_tokens=special)

    def chat(self) -> ChatRequest:
        """The request whose prompt this is."""
        assert self.messages is not None, "it is a text"
        return ChatRequest(
            model=self.model,
            messages=self.messages,
            tools=self.tools,
            add_special_tokens=self.add_special_tokens,
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            chat_template_kwargs=self.chat_template_kwargs,
        )


class DetokenizeRequest(_Body):
    """``POST /detokenize``."""

    tokens: list[TokenId] = Field(max_length=MAX_PROMPT_IDS)


class Tokenized(Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET
    """Entries of the vocabulary."""


class Detokenized(Struct, frozen=True, kw_only=True):
    prompt: str


class TokenizerInfo(Struct, frozen=True, kw_only=True):
    model: str
    max_model_len: int
    vocab_size: int
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None


class Version(Struct, frozen=True, kw_only=True):
    version: str
