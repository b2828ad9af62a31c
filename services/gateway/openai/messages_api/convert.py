"""A body of ``/v1/messages`` as the chat that it stands for."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from services.gateway.openai.errors import invalid
from services.gateway.openai.messages_api.fields import (
    Block,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from services.gateway.openai.schemas import ChatRequest

_Json = dict[str, Any]


def chat_of(body: MessagesRequest) -> ChatRequest:
    """The same request as a chat. Raises ``ApiError`` 400."""
    choice = body.tool_choice
    parallel = None if choice is None else not choice.disable_parallel_tool_use
    messages = list(_messages(body))
    begun = bool(messages) and _is_begun(messages[-1])
    fields = {
        "model": body.model,
        "messages": messages,
        "continue_final_message": begun or None,
        "add_generation_prompt": False if begun else None,
        "tools": [_tool(one.model_dump()) for one in body.tools or ()] or None,
        "tool_choice": _choice(choice),
        "parallel_tool_calls": parallel,
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "reasoning_effort": "none" if body.thinking and body.thinking.type == "disabled" else None,
        "response_format": _format(body),
        "stream": body.stream,
    }
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError:
        raise invalid("Invalid 'messages': there are too many of them.", "messages") from None


def _is_begun(message: _Json) -> bool:
    """Whether it is the answer's beginning, which is to go on."""
    return bool(message["role"] == "assistant" and message["content"] and len(message) == 2)


def _messages(body: MessagesRequest) -> Iterator[_Json]:
    if body.system:
        yield {"role": "system", "content": _text(body.system)}
    for turn in body.messages:
        yield from _turn(turn)


def _turn(turn: Turn) -> Iterator[_Json]:
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            result = {"tool_call_id": block.tool_use_id, "content": _text(block.content)}
            yield {"role": "tool", **result}
    said = _said(turn.content, turn.role)
    results = any(isinstance(block, ToolResultBlock) for block in turn.content)
    if said["content"] is None and "tool_calls" not in said:
        said["content"] = ""
    if said["content"] or "tool_calls" in said or not results:
        yield {"role": turn.role, **said}


def _said(blocks: Sequence[Block], role: str) -> _Json:
    """Text, reasoning and calls of a turn."""
    texts = [block.text for block in blocks if isinstance(block, TextBlock)]
    thoughts = [block.thinking for block in blocks if isinstance(block, ThinkingBlock)]
    calls = [_call(block) for block in blocks if isinstance(block, ToolUseBlock)]
    said: _Json = {"content": "".join(texts) if texts else None}
    if thoughts:
        said["reasoning_content"] = "".join(thoughts)
    if calls and role == "assistant":
        said["tool_calls"] = calls
    return said


def _call(block: ToolUseBlock) -> _Json:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _text(content: str | list[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _tool(tool: _Json) -> _Json:
    function = {name: tool[name] for name in ("name", "description", "strict")}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _format(body: MessagesRequest) -> _Json | None:
    asked = body.output_config.format if body.output_config else None
    asked = asked or body.output_format
    if asked is None:
        return None
    named = {"name": "answer", "schema": asked.schema_}
    return {"type": "json_schema", "json_schema": named}


def _choice(choice: ToolChoice | None) -> Any:
    if choice is None or choice.type in ("auto", "none"):
        return None if choice is None else choice.type
    if choice.type == "any":
        return "required"
    return {"type": "function", "function": {"name": choice.name or ""}}
