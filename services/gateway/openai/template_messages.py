"""Messages as chat templates look for them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from services.gateway.openai.call_ids import short_call_id
from services.gateway.openai.messages import Message

_SHORT_IDS: Final = re.compile(r"\bid['\"]?\]?\s*\|\s*length\s*(!=|<)\s*9\b")
"""A template that refuses ids of calls but those of nine letters and digits."""


def template_messages(
    messages: Sequence[Message], template: str, *, arguments_as_text: bool = False
) -> list[Mapping[str, Any]]:
    """``arguments_as_text``: of calls, which are objects otherwise where they can be."""
    id_of = short_call_id if _SHORT_IDS.search(template) else str
    names: dict[str, str] = {}
    """Of the functions that were called, by the calls' ids."""
    shown: list[Mapping[str, Any]] = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        shown.append(_message(message, names, id_of, as_text=arguments_as_text))
    return shown


def _message(
    message: Message, names: Mapping[str, str], id_of: Callable[[str], str], *, as_text: bool
) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    shown: dict[str, Any] = {"role": role, "content": message.text}
    name = message.name
    if role == "tool" and message.tool_call_id is not None:
        shown["tool_call_id"] = id_of(message.tool_call_id)
        name = name or names.get(message.tool_call_id)
    if name is not None:
        shown["name"] = name
    if message.reasoning_content is not None:
        shown["reasoning_content"] = message.reasoning_content
        if message.tool_calls and not message.text:  # as gpt-oss' template calls it
            shown["thinking"] = message.reasoning_content
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "id": id_of(call.id),
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, as_text=as_text),
                },
            }
            for call in message.tool_calls
        ]
    return shown


def _arguments(text: str, *, as_text: bool) -> Any:
    """An object, unless the template wants a text or it isn't one."""
    if as_text:
        return text
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text
