"""Bodies of ``/v1/responses``."""

from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from services.gateway.openai.known_fields import LABELS, Neutral, describing, served
from services.gateway.openai.lenient import Lenient
from services.gateway.openai.messages import MAX_MESSAGES, MAX_PARTS
from services.gateway.openai.model_name import ModelName
from services.gateway.openai.structured.fields import JsonObjectFormat, Schema, TextFormat
from services.gateway.openai.tools.fields import MAX_TOOLS, NAME

_NEUTRAL: Final[Neutral] = {
    "conversation": (),
    "background": (False,),
    "prompt": (),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "moderation": (),
    "context_management": ([],),
}
_ECHOED: Final = frozenset({"metadata", "user", "safety_identifier"})
_LABELS: Final = (LABELS - {"store"} - _ECHOED) | {"include", "stream_options"}


class InputText(Lenient):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputRefusal(Lenient):
    type: Literal["refusal"]
    refusal: str


InputPart = Annotated[InputText | InputRefusal, Field(discriminator="type")]
_Parts = Annotated[list[InputPart], Field(max_length=MAX_PARTS)]


def _form(value: Any) -> str:
    return "text" if isinstance(value, str) else "parts"


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[_Parts, Tag("parts")], Discriminator(_form)
]


class InputMessage(Lenient):
    """A turn of the conversation."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text


class InputCall(Lenient):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1, max_length=256)
    arguments: str


class InputOutput(Lenient):
    """What a call led to."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text


class _ReasoningText(Lenient):
    type: Literal["reasoning_text"]
    text: str


class InputReasoning(Lenient):
    """What the model thought before."""

    type: Literal["reasoning"]
    content: list[_ReasoningText] | None = Field(default=None, max_length=MAX_PARTS)


def _kind(value: Any) -> str:
    found = value.get("type", "message") if isinstance(value, dict) else getattr(value, "type", "")
    return found if isinstance(found, str) else ""


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[InputCall, Tag("function_call")]
    | Annotated[InputOutput, Tag("function_call_output")]
    | Annotated[InputReasoning, Tag("reasoning")],
    Discriminator(_kind),
]
_Items = Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
Input = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[_Items, Tag("parts")],
    Discriminator(_form),
]


class FunctionTool(Lenient):
    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChosenFunction(Lenient):
    type: Literal["function"]
    name: str


class AllowedFunctions(Lenient):
    """Of the tools, those that may be called now."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ChosenFunction] = Field(min_length=1, max_length=MAX_TOOLS)


def _choice(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, AllowedFunctions):
        return "allowed"
    allowed = isinstance(value, dict) and value.get("type") == "allowed_tools"
    return "word" if isinstance(value, str) else "allowed" if allowed else "named"


Choice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("word")]
    | Annotated[ChosenFunction, Tag("named")]
    | Annotated[AllowedFunctions, Tag("allowed")]
    | Annotated[None, Tag("none")],
    Discriminator(_choice),
]


class SchemaFormat(Lenient):
    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=256)
    schema_: Schema = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextOptions(Lenient):
    format: Annotated[
        TextFormat | JsonObjectFormat | SchemaFormat | None, Field(discriminator="type")
    ] = None
    verbosity: Literal["medium"] | None = None


class ReasoningOptions(Lenient):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: str | None = None
    """Ignored: reasoning is returned as it is."""


_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]


class ResponsesRequest(Lenient):
    """``POST /v1/responses``."""

    model_config = ConfigDict(json_schema_extra=describing(_NEUTRAL, _LABELS))
    accepted: ClassVar[frozenset[str]] = _LABELS | _NEUTRAL.keys()
    """Fields that it knows beside its own."""

    model: ModelName = Field(default_factory=str)
    """May be left out where one model is served."""
    input: Input
    instructions: str | None = None
    """Of this response alone: the ones that follow don't have them."""
    previous_response_id: str | None = Field(default=None, min_length=1, max_length=128)
    """Go on from a response that was kept. Refused where none are kept."""
    store: bool | None = None
    """false: the response is not kept. Where none are kept it means nothing."""
    tools: list[FunctionTool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    metadata: dict[_Key, _Value] | None = Field(default=None, max_length=16)
    """Is in the response as it came; so are the two below."""
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = Field(default=None, max_length=256)
    """Requests of the same key go to the same worker, as long as it isn't much busier."""

    @model_validator(mode="before")
    @classmethod
    def _drop_or_refuse(cls, data: Any) -> Any:
        return served(data, _NEUTRAL, _LABELS)
