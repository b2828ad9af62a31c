"""Bodies of requests.

Types are strict: ``"5"`` is not a number. A field that would change the result and isn't supported
is refused by name unless it has its neutral value; an unknown field is refused too. Fields that
only label a request are accepted and ignored.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES: Final = 128
"""Generations of one HTTP request: prompts times ``n``."""
MAX_LOGPROBS: Final = 20
MAX_STOPS: Final = 4
_MAX_SEED: Final = 2**63 - 1

_NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "repetition_penalty": (1, 1.0),
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


def _check_text(text: str) -> str:
    """JSON can carry halves of characters, which nothing behind the gateway can encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_check_text)]


def _check_prompt(value: Any) -> Any:
    """``str | list[str] | list[int] | list[list[int]]``, none of them empty."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string or a non-empty array of strings or token ids")
    if all(isinstance(item, str) for item in value) or _token_ids(value):
        return value
    if all(isinstance(item, list) and item and _token_ids(item) for item in value):
        return value
    raise ValueError("must hold only strings, only token ids, or only non-empty arrays of these")


def _token_ids(value: list[Any]) -> bool:
    return all(type(item) is int and 0 <= item < 2**32 for item in value)


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a non-empty string or an array of them")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} strings; at most {MAX_STOPS} are allowed")
    return stops


def _check_bias(value: Any) -> Any:
    """Token ids are JSON keys, hence strings."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token id to bias")
    for key, bias in value.items():
        if not (str(key).isdecimal() and int(key) < 2**32):
            raise ValueError(f"{key!r} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
    return {int(key): float(bias) for key, bias in value.items()}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(_Body):
    """What both endpoints have in common."""

    model: Text = Field(min_length=1, max_length=256)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """Extension. 0 and -1: every token."""
    seed: int | None = Field(default=None, ge=-_MAX_SEED, le=_MAX_SEED)
    stop: Annotated[list[Text], BeforeValidator(_check_stop)] = []
    stop_token_ids: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(
        default=None, max_length=64
    )
    """Extension."""
    ignore_eos: bool | None = None
    """Extension: go on past the model's end of sequence."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_check_bias)] = {}
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in _NEUTRAL.keys() & data.keys():
            if data[name] is not None and data[name] not in _NEUTRAL[name]:
                raise UnsupportedField(name)
        ignored = _NEUTRAL.keys() | _LABELS
        return {name: value for name, value in data.items() if name not in ignored}

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


class FieldError(ValueError):
    """A check over several fields failed; ``field`` is the one to name."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field = field
        self.reason = reason


class UnsupportedField(FieldError):
    """A field asks for something that would change the result and isn't supported."""

    def __init__(self, field: str) -> None:
        super().__init__(field, "is not supported")


class CompletionRequest(_Sampling):
    """``POST /v1/completions``."""

    prompt: Annotated[
        Text | list[Text] | list[int] | list[list[int]], BeforeValidator(_check_prompt)
    ]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _completion(self) -> Self:
        if self.best_of is not None and self.best_of != self.choices_per_prompt:
            raise FieldError("best_of", f"must equal n = {self.choices_per_prompt}")
        if self.echo and self.logprobs is not None:
            raise FieldError("echo", "with logprobs (of the prompt's tokens) is not supported")
        prompts = len(self.prompts)
        if prompts * self.choices_per_prompt > MAX_CHOICES:
            asked = f"{prompts} prompts times n = {self.choices_per_prompt}"
            raise FieldError("n", f"is too large: {asked}; at most {MAX_CHOICES} choices")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [item for item in self.prompt if isinstance(item, int)]
        return [ids] if ids else [item for item in self.prompt if not isinstance(item, int)]


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class Message(_Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def _check_messages(value: Any) -> Any:
    """Name what isn't supported, before the types of parts are looked at."""
    for index, message in enumerate(value if isinstance(value, list) else []):
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind is not None and kind != "text":
                raise ValueError(f"message {index} has a part of type {kind!r}; only text is")
        if isinstance(message, dict) and message.get("tool_calls"):
            raise ValueError(f"message {index} has tool_calls, which are not supported")
    return value


class ChatRequest(_Sampling):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], BeforeValidator(_check_messages)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _chat(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "is only allowed when logprobs is true")
        return self
