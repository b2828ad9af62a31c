"""A body of ``/v1/responses`` as the chat that it stands for."""

from collections.abc import Iterator
from typing import Any, TypeGuard

from pydantic import ValidationError

from services.gateway.openai.errors import invalid
from services.gateway.openai.responses_api.fields import (
    AllowedFunctions,
    ChosenFunction,
    InputCall,
    InputMessage,
    InputOutput,
    InputReasoning,
    InputText,
    ResponsesRequest,
    SchemaFormat,
    Text,
)
from services.gateway.openai.responses_api.turns import AssistantTurn, Part
from services.gateway.openai.schemas import ChatRequest

_Json = dict[str, Any]


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


def _messages(body: ResponsesRequest) -> Iterator[_Json]:
    if body.instructions:
        yield {"role": "system", "content": body.instructions}
    if isinstance(body.input, str):
        yield {"role": "user", "content": body.input}
        return
    turn = AssistantTurn()
    for item in body.input:
        if isinstance(item, InputOutput) or _is_told(item):
            yield from turn.message()
            turn = AssistantTurn()
            yield _message(item)
            continue
        if not turn.takes(item):
            yield from turn.message()
            turn = AssistantTurn()
        _add(turn, item)
    yield from turn.message()


def _is_told(item: Part) -> TypeGuard[InputMessage]:
    """Whether somebody else than the assistant says it."""
    return isinstance(item, InputMessage) and item.role != "assistant"


def _add(turn: AssistantTurn, item: Part) -> None:
    match item:
        case InputReasoning():
            turn.think(item)
        case InputCall():
            turn.call(item)
        case InputMessage():
            turn.text = _text(item.content)


def _message(item: InputMessage | InputOutput) -> _Json:
    if isinstance(item, InputMessage):
        return {"role": item.role, "content": _text(item.content)}
    return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}


def _text(content: Text) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.text if isinstance(part, InputText) else part.refusal for part in content)


def _tool(function: _Json) -> _Json:
    return {"type": "function", "function": function}


def _choice(choice: object) -> Any:
    if isinstance(choice, ChosenFunction):
        return _chosen(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = {"mode": choice.mode, "tools": [_chosen(one) for one in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _chosen(function: ChosenFunction) -> _Json:
    return {"type": "function", "function": {"name": function.name}}


def _format(body: ResponsesRequest) -> _Json | None:
    asked = None if body.text is None else body.text.format
    if asked is None:
        return None
    if isinstance(asked, SchemaFormat):
        return {"type": "json_schema", "json_schema": asked.model_dump(by_alias=True)}
    return {"type": asked.type}
