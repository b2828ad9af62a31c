"""Refusals of workers, by what the client has written and where."""

from typing import Any

import pytest

from precast.errors import InvalidRequest
from services.gateway.openai.errors import ApiError
from services.gateway.openai.interpret import Reading
from services.gateway.openai.plan import Endpoint, Plan
from services.gateway.openai.refusals import named_refusal
from services.gateway.openai.schemas import ChatRequest
from services.gateway.openai.structured.constraint import asked_of
from services.gateway.openai.tools.formats import FORMATS
from services.gateway.openai.tools.use import tool_use

CHAT: Any = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TAGS = {"type": "array", "uniqueItems": True}
HAS_TAGS = {"type": "object", "properties": {"tags": TAGS}}
HAS_NONE = {"type": "object", "properties": {"tags": {**TAGS, "uniqueItems": False}}}
KEYWORD = "constraint: json_schema: not supported: uniqueItems"
REGEX = "constraint: json_schema: unclosed group"


def tools(*schemas: Any, **fields: Any) -> Any:
    functions = [{"name": f"f{at}", "parameters": schema} for at, schema in enumerate(schemas)]
    listed = [{"type": "function", "function": {**one, **fields}} for one in functions]
    return {"tools": listed, "tool_choice": "auto" if fields else "required"}


def named(schema: Any) -> Any:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    }


def refused(reason: str, endpoint: Endpoint = "chat", **fields: Any) -> ApiError:
    body = ChatRequest.model_validate(CHAT | fields)
    plan = Plan(
        endpoint=endpoint,
        model="m",
        starts=(),
        echoes=(),
        stream=False,
        include_usage=False,
        continuous_usage=False,
        prompt_tokens=1,
        choices_per_prompt=1,
        shown_per_prompt=1,
        fingerprint="",
        reading=Reading(tools=tool_use(body, FORMATS["hermes"])),
        asked=asked_of(body),
    )
    told = named_refusal(InvalidRequest(reason), plan)
    assert isinstance(told, ApiError)
    assert told.message.startswith(f"Invalid '{told.param}': ")
    assert "constraint" not in told.message
    return told


@pytest.mark.parametrize(
    ("endpoint", "path"),
    [
        ("chat", "tools[1].function.parameters"),
        ("responses", "tools[1].parameters"),
        ("messages", "tools[1].input_schema"),
    ],
)
def test_a_keyword_of_a_tool(endpoint: Endpoint, path: str) -> None:
    told = refused(KEYWORD, endpoint, **tools(HAS_NONE, HAS_TAGS))
    assert told.param == f"{path}.properties.tags"
    assert told.message.endswith("': not supported: uniqueItems, in the function 'f1'.")


@pytest.mark.parametrize(
    ("fields", "endpoint", "path"),
    [
        (named(HAS_TAGS), "chat", "response_format.json_schema.schema.properties.tags"),
        (named(HAS_TAGS), "responses", "text.format.schema.properties.tags"),
        ({"guided_json": HAS_TAGS}, "completions", "guided_json.properties.tags"),
        ({"structured_outputs": {"json": TAGS}}, "chat", "structured_outputs.json"),
        (
            {"response_format": {"type": "json_object", "schema": HAS_TAGS}},
            "chat",
            "response_format.schema.properties.tags",
        ),
        (
            {**tools(HAS_NONE, strict=True), **named(HAS_TAGS)},
            "chat",
            "response_format.json_schema.schema.properties.tags",
        ),
    ],
)
def test_a_keyword_of_the_answers_own_schema(fields: Any, endpoint: Endpoint, path: str) -> None:
    told = refused(KEYWORD.replace("json_schema", "lark"), endpoint, **fields)
    assert told.param == path
    assert told.message == f"Invalid '{path}': not supported: uniqueItems."


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        (tools(HAS_NONE), "tools[0].function.parameters"),
        (tools(HAS_NONE, HAS_NONE), "tools"),
        ({**tools(HAS_NONE, strict=True), **named({})}, "tools"),
        (named({}), "response_format.json_schema.schema"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ],
)
def test_what_names_no_keyword(fields: Any, path: str) -> None:
    """It is told with the place of the schema, where there is but one."""
    told = refused(REGEX, **fields)
    assert told.param == path
    assert "unclosed group" in told.message


P = "tools[1].function.parameters"


@pytest.mark.parametrize(
    ("bad", "reason", "path", "told"),
    [
        ({"type": "integr"}, "Invalid type: integr", ".properties.p", None),
        ({"type": "string", "format": "x"}, "Unknown format: x", ".properties.p", None),
        (
            {"$ref": "#/$defs/none"},
            "Pointer '/$defs/tool_1/$defs/none' does not exist",
            ".properties.p",
            "Pointer '/$defs/none' does not exist",
        ),
        ({"pattern": "(?=a)"}, "look-around, including look-ahead,", ".properties.p", None),
        ({"pattern": "(a"}, "unclosed group", ".properties.p", None),
        ({"enum": []}, "required property 'p' is unsatisfiable", "", None),
    ],
)
def test_what_a_refusal_quotes_tells_where_it_is(
    bad: Any, reason: str, path: str, told: str | None
) -> None:
    good = {"type": "object", "properties": {"a": {"type": "string", "format": "date"}}}
    schema = {"type": "object", "properties": {"p": bad}, "required": ["p"]}
    error = refused(f"constraint: json_schema: {reason}", **tools(good, schema))
    assert error.param == P + path
    assert (
        error.message
        == f"Invalid '{P}{path}': json_schema: {told or reason}, in the function 'f1'."
    )
    twice = refused(f"constraint: json_schema: {reason}", **tools(schema, schema))
    assert twice.param == "tools"


@pytest.mark.parametrize("field", ["response_format", "grammar"])
def test_only_who_writes_grammars_reads_of_them(field: str) -> None:
    fields = {"grammar": 'root ::= "a"'} if field == "grammar" else named({})
    told = refused("constraint: lark: is too complex", **fields)
    assert ("lark" in told.message) == (field == "grammar")


def test_other_refusals_stay_what_they_are() -> None:
    error = InvalidRequest("stop: too long")
    assert named_refusal(error, None) is error  # type: ignore[arg-type]
