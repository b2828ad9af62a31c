"""Messages of a chat, as clients write them.

An SDK's answer object, put back into the conversation whole, has to be accepted: fields that this
server doesn't know are ignored here, at any depth, and those that ask for nothing may be null.
"""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_MESSAGES: Final = 8192
MAX_PARTS: Final = 8192


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


class _Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class TextPart(_Lenient):
    type: Literal["text"]
    text: str

    @property
    def shown(self) -> str:
        return self.text


class RefusalPart(_Lenient):
    """What an assistant's message may hold in place of text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def shown(self) -> str:
        return self.refusal


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


def _form(content: Any) -> str | None:
    """Which form of content this is; only that one's errors are told."""
    if isinstance(content, str):
        return "text"
    if isinstance(content, list):
        return "parts"
    return "none" if content is None else None


Content = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag("parts")]
    | Annotated[None, Tag("none")],
    Discriminator(
        _form,
        custom_error_type="content_form",
        custom_error_message="must be a string or an array of content parts",
    ),
]


_UNSERVED: Final[dict[str, tuple[Any, ...]]] = {"function_call": (None,), "audio": (None,)}
"""Fields that aren't supported, and their values that ask for nothing."""


class PastFunction(_Lenient):
    name: str = Field(min_length=1, max_length=256)
    arguments: str
    """JSON, as far as the model got it right."""


class PastCall(_Lenient):
    """A call that the assistant made."""

    id: str = ""
    type: Literal["function"] = "function"
    function: PastFunction


def _complete(schema: dict[str, Any]) -> None:
    """Add to a reference what the model's fields don't say."""
    for name, values in _UNSERVED.items():
        schema["properties"][name] = {"enum": list(values), "description": "Not supported."}
    assistant = {"role": {"enum": ["assistant"]}}
    calls = {"tool_calls": {"type": "array", "minItems": 1}}
    schema["allOf"] = [
        {
            "anyOf": [
                {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]},
                {
                    "properties": {**assistant, "refusal": {"type": "string"}},
                    "required": ["refusal"],
                },
                {"properties": {**assistant, **calls}, "required": ["tool_calls"]},
            ]
        },
        {
            "anyOf": [
                {"properties": assistant},
                {"properties": {"tool_calls": {"enum": [None, []]}}},
            ]
        },
    ]


class Message(_Lenient):
    """One message of a chat."""

    model_config = ConfigDict(json_schema_extra=_complete)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[PastCall] | None = Field(default=None, max_length=MAX_PARTS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """What the assistant thought before it answered."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unserved(cls, data: Any) -> Any:
        for field, nothing in _UNSERVED.items():
            if isinstance(data, dict) and data.get(field) not in nothing:
                raise UnsupportedField(field)
        return data

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise FieldError("tool_calls", "is only allowed in messages of the assistant")
        refused = self.role == "assistant" and self.refusal is not None
        if self.content is None and not refused and not self.tool_calls:
            raise FieldError("content", "is required")
        return self

    @property
    def text(self) -> str:
        if self.content is None:
            return self.refusal or ""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.shown for part in self.content)
