"""What the bodies of completions and chats have in common."""

from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from services.gateway.openai.fields import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PROMPT_IDS,
    LogitBias,
    Stop,
    whole,
)
from services.gateway.openai.known_fields import LABELS, NEUTRAL, described, served
from services.gateway.openai.messages import FieldError
from services.gateway.openai.model_name import ModelName
from services.gateway.openai.structured.fields import StructureFields

_MAX_SEED: Final = 2**63 - 1
_MAX_TOKENS: Final = 2**31
TokenId = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(whole)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True
    )

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
    schema["description"] = described(NEUTRAL.keys() - schema["properties"].keys(), LABELS)
    rules = [_either("stream", True, "stream_options", None)]
    if "top_logprobs" in schema["properties"]:
        rules.append(_either("logprobs", True, "top_logprobs", None))
    schema["allOf"] = rules


class GenerationFields(StructureFields):
    """Fields of both endpoints."""

    model_config = ConfigDict(
        strict=True,
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_complete,
    )

    accepted: ClassVar[frozenset[str]] = LABELS | NEUTRAL.keys()
    """Fields that it knows beside its own."""

    model: ModelName = Field(default_factory=str)
    """May be left out where one model is served."""
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    """Extension. 0 and -1: every token."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Extension: least probability of a token, as a share of the likeliest one's."""
    seed: int | None = Field(default=None, ge=-_MAX_SEED, le=_MAX_SEED)
    stop: Stop = Field(default=[])
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    """Extension."""
    include_stop_str_in_output: bool | None = None
    """Extension: a stop string that ended the answer is part of it."""
    ignore_eos: bool | None = None
    """Extension: go on past the model's end of sequence."""
    min_tokens: int | None = Field(default=None, ge=0, lt=_MAX_TOKENS)
    """Extension: nothing ends the answer before this many tokens but a stop string."""
    skip_special_tokens: bool | None = None
    """Extension. false: special tokens are part of the text."""
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    """Extension: above 1, tokens of prompt and answer are less likely."""
    repeat_penalty: float | None = Field(default=None, gt=0, le=100)
    """Extension: repetition_penalty, as llama-server calls it."""
    n_predict: int | None = Field(default=None, ge=-1, lt=_MAX_TOKENS)
    """Extension: max_tokens, as llama-server calls it; -1: what the context has left."""
    logit_bias: LogitBias = Field(default={})
    allowed_token_ids: list[TokenId] | None = Field(
        default=None, min_length=1, max_length=MAX_PROMPT_IDS
    )
    """Extension, as vLLM has it: no other token is drawn, one that ends the answer included."""
    bad_words: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, max_length=MAX_BAD_WORDS
    )
    """Extension, as vLLM has it: words that don't turn up, with or without a blank before them."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Extension, as vLLM has it: log-probabilities of the prompt's tokens, with so many of the
    likeliest ones beside each."""
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    """Extension: what is cached of a prompt is shared only by requests of the same salt, so that
    nobody can tell from a first token's time what others have sent."""
    prompt_cache_key: str | None = Field(default=None, max_length=256)
    """Requests of the same key go to the same worker, as long as it isn't much busier than others:
    what their prompts have in common is in its cache."""
    priority: int | None = Field(default=None, gt=-(2**31), lt=2**31)
    """Extension, as vLLM has it: of requests that wait, lower ones go first; 0 is usual."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, lt=_MAX_TOKENS)
    """Extension: keep only so many tokens at the prompt's end; -1: what the context takes."""
    add_special_tokens: bool | None = None
    """Extension: put the tokenizer's own tokens, such as BOS, in front of the text of a prompt.
    true for completions, false for chats, whose templates write them."""
    return_token_ids: bool | None = None
    """Extension: the answer has the ids of prompt and answer too."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        unserved = {name: NEUTRAL[name] for name in NEUTRAL.keys() - cls.model_fields.keys()}
        return served(data, unserved, LABELS)

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
