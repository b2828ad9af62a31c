"""Bodies of ``/v1/embeddings``."""

from typing import Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, model_validator

from services.gateway.openai.fields import Inputs, prompts_of
from services.gateway.openai.known_fields import LABELS, Neutral, describing, served
from services.gateway.openai.lenient import Lenient
from services.gateway.openai.model_name import ModelName

Pooling = Literal["mean", "last"]
_NEUTRAL: Final[Neutral] = {
    "messages": (),
    "input_type": (),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
}
_LABELS: Final = LABELS


class EmbeddingRequest(Lenient):
    """``POST /v1/embeddings``."""

    model_config = ConfigDict(json_schema_extra=describing(_NEUTRAL, _LABELS))
    accepted: ClassVar[frozenset[str]] = _LABELS | _NEUTRAL.keys()
    """Fields that it knows beside its own."""

    model: ModelName = Field(default_factory=str)
    """May be left out where one model is served."""
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, lt=2**31)
    """The vector's first values, so many; refused where the model has fewer."""
    pooling: Pooling | None = None
    """Extension: the mean over all tokens, or the last one's; else as the server is set."""
    normalize: bool | None = None
    """Extension. false: vectors keep their length, which is 1 otherwise."""
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, lt=2**31)
    """Extension: keep only so many tokens at an input's end; -1: what the context takes."""
    add_special_tokens: bool | None = None
    """Extension. false: no token such as BOS in front of a text."""
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    """Extension, as of completions."""
    priority: int | None = Field(default=None, gt=-(2**31), lt=2**31)
    """Extension, as of completions."""

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        return served(data, _NEUTRAL, _LABELS)

    @property
    def inputs(self) -> list[str | list[int]]:
        """One entry an input: text or token ids."""
        return prompts_of(self.input)
