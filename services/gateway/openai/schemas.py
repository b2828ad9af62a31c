"""Bodies of requests.

Types are strict: ``"5"`` is not a number. A field that would change the result and isn't supported
is refused by name unless it has its neutral value. Fields that only label a request are accepted,
and so are unknown ones, which the answer names.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from services.gateway.openai.fields import MAX_CHOICES, MAX_LOGPROBS, Prompt, prompts_of
from services.gateway.openai.generation_fields import GenerationFields
from services.gateway.openai.messages import MAX_MESSAGES, FieldError, Message
from services.gateway.openai.tools.fields import ToolFields


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``."""

    prompt: Prompt
    suffix: str | None = None
    """Text after the answer. Refused where the model has no tokens for infilling."""
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    """Answers to generate, of which the ``n`` likeliest (by token) are returned."""
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    """0, with echo: only the prompt is returned, and scored where logprobs are asked for."""

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens of an answer; None if that was left open."""
        if self.n_predict is None or self.n_predict < 0:
            return self.max_tokens
        return self.n_predict

    @property
    def generated_per_prompt(self) -> int:
        """Choices that are generated, of which some may not be shown."""
        return self.best_of or self.choices_per_prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: text or token ids."""
        return prompts_of(self.prompt)


class ChatFields(ToolFields):
    """What else a chat's body may have."""

    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    """For the chat template. Refused where that has no use for it."""
    include_reasoning: bool | None = None
    """Extension. false: the model's reasoning is left out of the answer."""
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=64)
    """Extension: variables of the chat template, such as enable_thinking."""
    add_generation_prompt: bool | None = None
    """Extension. false: the prompt ends with the last message."""
    continue_final_message: bool | None = None
    """Extension: the answer goes on with the last message, which stays open."""


class ChatRequest(GenerationFields, ChatFields):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]

    @model_validator(mode="after")
    def _chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "is only allowed when logprobs is true")
        return self

    @property
    def asked_tokens(self) -> int | None:
        """Most tokens of an answer; None if that was left open."""
        return self.max_completion_tokens or self.max_tokens or max(0, self.n_predict or 0) or None
