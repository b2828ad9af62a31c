"""``tools`` and ``tool_choice``, as clients write them."""

from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    Discriminator,
    Field,
    Tag,
)

from services.gateway.openai.lenient import Lenient

MAX_TOOLS: Final = 512
NAME: Final = r"^[a-zA-Z0-9_.:-]{1,128}$"
NO_PARAMETERS: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {},
    "additionalProperties": False,
}


class Function(Lenient):
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema; without one the function has no parameters."""
    strict: bool | None = None
    """Arguments follow the schema, also where the model chooses whether to call."""

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return NO_PARAMETERS if self.parameters is None else self.parameters


class Tool(Lenient):
    type: Literal["function"]
    function: Function

    def shown(self) -> dict[str, Any]:
        """As chat templates get it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class FunctionName(Lenient):
    name: str


class NamedChoice(Lenient):
    """The function to call."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Lenient):
    mode: Literal["auto", "required"]
    tools: list[NamedChoice] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedChoice(Lenient):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _form(value: Any) -> str:
    if isinstance(value, dict):
        return "allowed" if value.get("type") == "allowed_tools" else "named"
    return "none" if value is None else "word"


ToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag("word")]
    | Annotated[NamedChoice, Tag("named")]
    | Annotated[AllowedChoice, Tag("allowed")]
    | Annotated[None, Tag("none")],
    Discriminator(_form),
]


class ToolFields(BaseModel):
    """What a chat's body may say of tools."""

    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
