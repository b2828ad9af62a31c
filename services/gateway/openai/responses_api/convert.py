"""A body of ``/v1/responses`` as the chat that it stands for."""

import re
from collections.abc import Iterator
from typing import Any, Final

from pydantic import ValidationError

from services.gateway.openai.errors import ApiError, invalid
from services.gateway.openai.responses_api.fields import (
    ChosenFunction,
    InputCall,
    InputItem,
    InputMessage,
    InputOutput,
    InputText,
    ResponsesRequest,
    SchemaFormat,
    Text,
)
from services.gateway.openai.schemas import ChatRequest

_Json = dict[str, Any]
_NAMES: Final = (
    (re.compile(r"^messages\b.*"), "input"),
    (re.compile(r"^response_format\.json_schema"), "text.format"),
    (re.compile(r"^response_format"), "text.format"),
    (re.compile(r"^max_completion_tokens$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^(tools\[\d+\])\.function"), r"\1"),
)
"""Paths of a chat's fields, and what the client has written in their places."""


def chat_of(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat. Raises ``ApiError`` 400."""
    fields = {
        "model": body.model,
        "messages": list(_messages(body)) or [{"role": "user", "content": ""}],
        "tools": [_tool(one.model_dump(exclude={"type"})) for one in body.tools or ()] or None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body),
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "stream": body.stream,
        "prompt_cache_key": body.prompt_cache_key,
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError:
        raise invalid("Invalid 'input': it has too many items.", "input") from None


def as_written(error: ApiError) -> ApiError:
    """An error about the chat, with the names of the client's own fields."""
    if error.param is None:
        return error
    param = path_as_written(error.param)
    return ApiError(
        error.status,
        error.message.replace(f"'{error.param}'", f"'{param}'"),
        kind=error.kind,
        param=param,
        code=error.code,
        headers=error.headers,
    )


def path_as_written(path: str) -> str:
    """A field of the chat, as the client has called it."""
    for pattern, name in _NAMES:
        if pattern.search(path):
            return pattern.sub(name, path)
    return path


def _messages(body: ResponsesRequest) -> Iterator[_Json]:
    if body.instructions:
        yield {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
        return
    pending: list[_Json] = []
    """Calls of one turn: they belong to one message."""
    for item in body.input:
        if isinstance(item, InputCall):
            pending.append(_call(item))
            continue
        if pending:
            yield {"role": "assistant", "content": None, "tool_calls": pending}
            pending = []
        yield from _message(item)
    if pending:
        yield {"role": "assistant", "content": None, "tool_calls": pending}


def _message(item: InputItem) -> Iterator[_Json]:
    if isinstance(item, InputMessage):
        yield {"role": item.role, "content": _text(item.content)}
    elif isinstance(item, InputOutput):
        yield {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}


def _text(content: Text) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, InputText) else part.refusal for part in content)


def _call(item: InputCall) -> _Json:
    function = {"name": item.name, "arguments": item.arguments}
    return {"id": item.call_id, "type": "function", "function": function}


def _tool(function: _Json) -> _Json:
    return {"type": "function", "function": function}


def _choice(choice: object) -> Any:
    if isinstance(choice, ChosenFunction):
        return {"type": "function", "function": {"name": choice.name}}
    return choice


def _format(body: ResponsesRequest) -> _Json | None:
    asked = None if body.text is None else body.text.format
    if asked is None:
        return None
    if isinstance(asked, SchemaFormat):
        return {"type": "json_schema", "json_schema": asked.model_dump(by_alias=True)}
    return {"type": asked.type}
