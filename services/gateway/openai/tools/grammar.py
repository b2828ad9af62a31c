"""Grammars that make a model call a tool, or call it rightly."""

import json
import re
from collections.abc import Sequence
from typing import Any, Final

from precast.json_schema import without_idle
from services.gateway.openai.tools.fields import Tool
from services.gateway.openai.tools.format import ToolFormat

_Schema = dict[str, Any]
_OPTIONS: Final[_Schema] = {
    "whitespace_pattern": r"[ ]|\n[ ]{0,40}",
    "lenient": False,
    "coerce_one_of": False,
}
"""As workers read schemas that come alone: no endless blanks, and nothing left out in silence,
whatever the schema's own options say."""
_TEXT: Final = r"/(.|\n)*/"


def forced_schema(tools: Sequence[Tool], *, several: bool) -> _Schema:
    """The JSON that an answer has to be: one call of these tools, or a list of calls."""
    calls = [_call(tool, f"#/$defs/{_def(at)}") for at, tool in enumerate(tools)]
    one: _Schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
    whole: _Schema = {"type": "array", "minItems": 1, "items": one} if several else one
    return {"$defs": definitions(tools), **whole}


def json_in_lark(schema: Any) -> str:
    """A schema within a grammar."""
    kept = without_idle(schema)
    whole = {**kept, "x-guidance": _OPTIONS} if isinstance(kept, dict) else kept
    return f"%json {json.dumps(whole, ensure_ascii=False, separators=(',', ':'))}"


def definitions(tools: Sequence[Tool]) -> _Schema:
    """Schemas of the tools' arguments, whose references are right within a larger schema."""
    return {
        _def(at): _moved(tool.function.schema_of_arguments, f"#/$defs/{_def(at)}")
        for at, tool in enumerate(tools)
    }


def strict_lark(
    form: ToolFormat,
    tools: Sequence[Tool],
    *,
    marks: Sequence[str],
    content: str | None,
    several: bool,
) -> str:
    """Lark for an answer that is text or calls, whose arguments are right in strict tools.

    ``marks``: the format's marks, as Lark writes them; ``content``: the schema of an answer without
    calls, None for any text.
    """
    named = form.syntax.bare_by_name
    if not marks and content is not None and not named:
        return _bare_or(content, tools)
    bodies = [f"body_{at}: {_body(form, tool)}" for at, tool in enumerate(tools)]
    body = "body: " + " | ".join(f"body_{at}" for at in range(len(tools)))
    if named:
        start = _named(tools, content)
    elif not marks:
        start = ["start: body | text", r'text: /[^{\[](.|\n)*/ | ""']
    elif content is None:
        start = _within_text(marks, several=several)
    else:
        start = _instead_of(marks, content, several=several)
    return "\n".join(["%llguidance {}", *start, body, *bodies, ""])


def _within_text(marks: Sequence[str], *, several: bool) -> list[str]:
    """Calls in the middle of a text; a mark ends the text in front of it."""
    return [
        "start: call* tail" if several else "start: tail | call",
        f"tail: {_TEXT}",
        "call: head body",
        *(_head(at, mark) for at, mark in enumerate(marks)),
        "head: " + " | ".join(f"head_{at}" for at in range(len(marks))),
    ]


def _head(at: int, mark: str) -> str:
    lazy = "[lazy]" if mark.startswith('"') else ""  # the others are tokens by themselves
    return f"head_{at}{lazy}: {_TEXT} {mark}"


def _instead_of(marks: Sequence[str], content: str, *, several: bool) -> list[str]:
    return [
        f"start: answer | call{'+' if several else ''}",
        f"answer: {json_in_lark(json.loads(content))}",
        f"call: ({' | '.join(marks)}) body",
    ]


def _named(tools: Sequence[Tool], content: str | None) -> list[str]:
    """A call begins with the line of a function's name, and no text does."""
    if content is not None:
        return ["start: body | answer", f"answer: {json_in_lark(json.loads(content))}"]
    names = "|".join(re.escape(tool.function.name) for tool in tools)
    return ["start: body | TEXT", rf"TEXT: {_TEXT} & ~/[ \t\r\n]*({names})[ \t\r]*\n(.|\n)*/"]


def _bare_or(content: str, tools: Sequence[Tool]) -> str:
    """A call is the whole answer, as the object that it may be otherwise: one schema for both."""
    calls = [_call(tool, f"#/$defs/{_def(at)}") for at, tool in enumerate(tools)]
    free = {at: {"type": "object"} for at, tool in enumerate(tools) if not tool.function.strict}
    shared = {**definitions(tools), **{_def(at): schema for at, schema in free.items()}}
    answer = _moved(json.loads(content), "#/$defs/answer")
    schema = {"$defs": {**shared, "answer": answer}, "anyOf": [*calls, {"$ref": "#/$defs/answer"}]}
    return f"%llguidance {{}}\nstart: {json_in_lark(schema)}\n"


def _body(form: ToolFormat, tool: Tool) -> str:
    head = json.dumps(form.head_of(tool.function.name))
    tail = json.dumps(form.tail) if form.tail else ""
    schema = tool.function.schema_of_arguments if tool.function.strict else {"type": "object"}
    return f"{head} {json_in_lark(schema)} {tail}"


def _call(tool: Tool, arguments: str) -> _Schema:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": {"$ref": arguments}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _def(at: int) -> str:
    return f"tool_{at}"


def _moved(schema: Any, to: str) -> Any:
    """The schema as a part of another one, at ``to``."""
    if isinstance(schema, list):
        return [_moved(item, to) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _moved_value(key, value, to) for key, value in schema.items()}


def _moved_value(key: str, value: Any, to: str) -> Any:
    if key == "$ref" and isinstance(value, str) and value.startswith("#"):
        return to + value[1:]
    return _moved(value, to)
