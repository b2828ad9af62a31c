"""Bodies of requests.

Types are strict: ``"5"`` is not a number. A field that would change the result and isn't supported
is refused by name unless it has its neutral value; an unknown field is refused too. Fields that
only label a request are accepted and ignored.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.gateway.openai.fields import MAX_CHOICES, LogitBias, Prompt, Stop, whole
from services.gateway.openai.messages import MAX_MESSAGES, FieldError, Message, UnsupportedField

MAX_LOGPROBS: Final = 20
_MAX_SEED: Final = 2**63 - 1

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "min_p": (0,),
    "min_tokens": (0,),
    "repetition_penalty": (1,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Known fields that aren't supported, and the values (beside null) that ask for nothing."""

_LABELS: Final = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    }
)
"""Fields that don't change a result."""


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Null, or one of the values; false is not 0 here."""
    return value is None or (not isinstance(value, bool) and value in neutral)


class _Body(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """Extension: every chunk carries the usage up to it."""
    include_obfuscation: Literal[False] | None = None


def _either(field: str, value: Any, other: str, value_of_other: Any) -> dict[str, Any]:
    """The rule that ``field`` has this value or the other field has the value that goes with it."""
    first = {"properties": {field: {"enum": [value]}}, "required": [field]}
    return {"anyOf": [first, {"properties": {other: {"enum": [value_of_other]}}}]}


def _complete(schema: dict[str, Any]) -> None:
    """Add to a reference what the model's fields don't say."""
    for name, values in _NEUTRAL.items():
        schema["properties"][name] = {"enum": [None, *values], "description": "Not supported."}
    for name in sorted(_LABELS):
        schema["properties"][name] = {"description": "Ignored."}
    rules = [_either("stream", True, "stream_options", None)]
    if "top_logprobs" in schema["properties"]:
        rules.append(_either("logprobs", True, "top_logprobs", None))
    if "echo" in schema["properties"]:
        silent: dict[str, Any] = {"properties": {"echo": {"enum": [None, False]}}}
        rules.append({"anyOf": [silent, {"properties": {"logprobs": {"type": "null"}}}]})
    schema["allOf"] = rules


class _Sampling(_Body):
    """What both endpoints have in common."""

    model_config = ConfigDict(json_schema_extra=_complete)

    model: str = Field(min_length=1, max_length=256)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """Extension. 0 and -1: every token."""
    seed: int | None = Field(default=None, ge=-_MAX_SEED, le=_MAX_SEED)
    stop: Stop = []
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(whole)]] | None = (
        Field(default=None, max_length=64)
    )
    """Extension."""
    ignore_eos: bool | None = None
    """Extension: go on past the model's end of sequence."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: LogitBias = {}
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    """Extension: what is cached of a prompt is shared only by requests of the same salt, so that
    nobody can tell from a first token's time what others have sent."""
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in _NEUTRAL.keys() & data.keys():
            if not _is_neutral(data[name], _NEUTRAL[name]):
                raise UnsupportedField(name)
        ignored = _NEUTRAL.keys() | _LABELS
        return {name: whole(value) for name, value in data.items() if name not in ignored}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "is only allowed when stream is true")
        return self

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(_Sampling):
    """``POST /v1/completions``."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1)
    """None or ``n``."""

    @model_validator(mode="after")
    def _completion(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise FieldError("echo", "with logprobs (of the prompt's tokens) is not supported")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class ChatRequest(_Sampling):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "is only allowed when logprobs is true")
        return self
