"""Bodies of ``/v1/messages``."""

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from services.gateway.openai.known_fields import Neutral, describing, served
from services.gateway.openai.lenient import Lenient
from services.gateway.openai.messages import MAX_MESSAGES, MAX_PARTS
from services.gateway.openai.model_name import ModelName
from services.gateway.openai.tools.fields import MAX_TOOLS, NAME

_NEUTRAL: Final[Neutral] = {
    "container": (),
    "mcp_servers": ([],),
    "context_management": ({}, {"edits": []}),
}
_LABELS: Final = frozenset({"metadata", "service_tier", "betas"})


class TextBlock(Lenient):
    type: Literal["text"]
    text: str


class ThinkingBlock(Lenient):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(Lenient):
    """Reasoning of another server's model, which nobody here can read: it is left out."""

    type: Literal["redacted_thinking"]


class ToolUseBlock(Lenient):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]


def _form(value: Any) -> str:
    return "text" if isinstance(value, str) else "blocks"


_Texts = Annotated[list[TextBlock], Field(max_length=MAX_PARTS)]
Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[_Texts, Tag("blocks")], Discriminator(_form)
]


class ToolResultBlock(Lenient):
    """What a call led to."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Text = ""


Block = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
_Blocks = Annotated[list[Block], Field(max_length=MAX_PARTS)]
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[_Blocks, Tag("blocks")], Discriminator(_form)
]


class Turn(Lenient):
    role: Literal["user", "assistant"]
    content: Content


class MessagesTool(Lenient):
    type: Literal["custom"] | None = None
    """First, so that it is what an error names for tools of Anthropic's servers."""
    name: str = Field(pattern=NAME)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class ToolChoice(Lenient):
    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None
    """With type tool."""
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Lenient):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Lenient):
    """Whatever effort it asks for."""

    accepted: ClassVar[frozenset[str]] = frozenset({"effort"})
    format: OutputFormat | None = None


class Thinking(Lenient):
    type: Literal["enabled", "disabled", "adaptive"]


class MessagesRequest(Lenient):
    """``POST /v1/messages``."""

    model_config = ConfigDict(json_schema_extra=describing(_NEUTRAL, _LABELS))
    accepted: ClassVar[frozenset[str]] = _LABELS | _NEUTRAL.keys()
    """Fields that it knows beside its own."""

    model: ModelName = Field(default_factory=str)
    """May be left out where one model is served."""
    messages: list[Turn] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int = Field(ge=1, lt=2**31)
    system: Text | None = None
    stop_sequences: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, max_length=64
    )
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=2**31)
    top_p: float | None = Field(default=None, gt=0, le=1)
    tools: list[MessagesTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    """disabled: without reasoning, where the chat template can do that."""
    output_config: OutputConfig | None = None
    """The answer follows its schema."""
    output_format: OutputFormat | None = None
    """The same, as it was called at first."""
    stream: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        return served(data, _NEUTRAL, _LABELS)


class CountTokensRequest(MessagesRequest):
    """``POST /v1/messages/count_tokens``: a body of ``/v1/messages`` to count the prompt of."""

    max_tokens: int = Field(default=1, ge=1, lt=2**31)
