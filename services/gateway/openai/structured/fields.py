"""Fields that say what form an answer has, in the ways of OpenAI, vLLM and llama-server."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from services.gateway.openai.lenient import Lenient

Schema = dict[str, Any] | bool
"""A JSON schema."""


class TextFormat(Lenient):
    type: Literal["text"]


class JsonObjectFormat(Lenient):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """Extension, as llama-server has it."""


class NamedSchema(Lenient):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: Schema | None = Field(default=None, alias="schema")
    """Without one, any JSON object."""
    strict: bool | None = None
    """The answer follows the schema either way."""


class JsonSchemaFormat(Lenient):
    """llama-server's ``{"type": "json_schema", "schema": ...}`` is read too."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "schema" not in data or "json_schema" in data:
            return data
        return {**data, "json_schema": {"name": "schema", "schema": data["schema"]}}


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Lenient):
    """vLLM's field: exactly one of these."""

    json_: str | Schema | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = Field(default=None, min_length=1)
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(default=None, min_length=1)
    grammar: str | None = Field(default=None, min_length=1)

    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None


class StructureFields(BaseModel):
    """What a request's body may say of the form of the answer: one field at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """Extension, as vLLM has it."""
    guided_json: str | Schema | None = None
    """Extension, as older vLLM has it; so are the other ``guided_`` fields."""
    guided_regex: str | None = Field(default=None, min_length=1)
    guided_choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, min_length=1
    )
    guided_grammar: str | None = Field(default=None, min_length=1)
    grammar: str | None = Field(default=None, min_length=1)
    """Extension, as llama-server has it: GBNF."""
    json_schema: dict[str, Any] | None = None
    """Extension, as llama-server has it."""
