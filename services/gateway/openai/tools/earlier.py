"""Earlier calls and their results, in a way that the model's chat template shows.

Templates differ: some refuse several calls in a turn (Llama 3) or show the first alone (gpt-oss),
some want arguments as a text (DeepSeek R1), some drop calls in silence (Phi-4-mini, Granite 3,
LFM2). Which way works is found by rendering a chat whose words nothing else has.
"""

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

from precast.errors import InvalidRequest
from precast.tokenizer.chat_template import ChatOptions, ChatTemplate
from services.gateway.openai.messages import Message
from services.gateway.openai.template_messages import template_messages
from services.gateway.openai.tools.format import ToolFormat
from services.gateway.openai.tools.formats import format_of, knows_tools
from services.gateway.openai.tools.generic import FORMAT as GENERIC
from services.gateway.openai.tools.generic import explained

_Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class CallStyle:
    """A way to show earlier calls."""

    by: Literal["template", "metadata", "content", "user"] = "template"
    """The template itself, from the messages' calls, or from functions' names in ``metadata``; the
    content of the assistant's messages, as the model writes calls; or that, with results as words
    of the user."""
    arguments_as_text: bool = False
    one_a_turn: bool = False
    """A turn for each call, with its result behind it."""


_STYLES: Final = (
    CallStyle(),
    CallStyle(arguments_as_text=True),
    CallStyle(one_a_turn=True),
    CallStyle(one_a_turn=True, arguments_as_text=True),
    CallStyle(by="metadata", one_a_turn=True, arguments_as_text=True),
    CallStyle(by="content"),
    CallStyle(by="user"),
)
"""The first that shows all is taken."""


@lru_cache(maxsize=16)
def style_of(template: ChatTemplate) -> CallStyle:
    """How to show calls to this template. It is rendered up to seven times, 2 s each at most."""
    if not knows_tools(template.source):
        return CallStyle(by="user")
    return next((style for style in _STYLES if _shows_all(template, style)), CallStyle())


def shown_earlier(
    messages: Sequence[Message], template: str, style: CallStyle
) -> tuple[list[_Message], Mapping[str, str]]:
    """Messages for the template, and the texts that ``ChatOptions.placeholders`` wants."""
    found = template_messages(messages, template, arguments_as_text=style.arguments_as_text)
    if style.by == "user":
        return explained(found, []), {}
    if style.by == "content":
        return _in_content(found, format_of(template) or GENERIC)
    turns = list(_one_a_turn(found)) if style.one_a_turn else found
    return (list(_with_metadata(turns)) if style.by == "metadata" else turns), {}


def _one_a_turn(messages: Sequence[_Message]) -> Iterator[_Message]:
    """Each call with its result behind it. What no call's id leads to stays in its place."""
    left = list(messages)
    while left:
        message = left.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            yield message
            continue
        end = next((at for at, one in enumerate(left) if one["role"] != "tool"), len(left))
        results, left = left[:end], left[end:]
        rest = {"role": message["role"], "content": ""}
        for place, call in enumerate(calls):
            yield {**(rest if place else message), "tool_calls": [call]}
            own = [one for one in results if one.get("tool_call_id") == call["id"]]
            results = [one for one in results if one not in own]
            yield from own
        yield from results


def _with_metadata(messages: Sequence[_Message]) -> Iterator[_Message]:
    """As GLM-4's template has them: a turn for each call, and the role of its result."""
    for message in messages:
        if message["role"] == "tool":
            yield {**message, "role": "observation"}
            continue
        calls = message.get("tool_calls", ())
        if message["content"] or not calls:
            yield {key: value for key, value in message.items() if key != "tool_calls"}
        for function in (call["function"] for call in calls):
            said = {"metadata": function["name"], "content": function["arguments"]}
            yield {"role": message["role"], **said}


def _in_content(
    messages: Sequence[_Message], form: ToolFormat
) -> tuple[list[_Message], dict[str, str]]:
    """Calls as the model writes them. Its marks are put in behind the template's back: as part of a
    message they would be a text that looks like a control token, and no such token."""
    placeholders = {mark: f"mark-{secrets.token_hex(8)}" for mark in form.marks}
    found = [_with_content(message, form, placeholders) for message in messages]
    return found, {placeholder: mark for mark, placeholder in placeholders.items()}


def _with_content(message: _Message, form: ToolFormat, placeholders: Mapping[str, str]) -> _Message:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    if not calls:
        return message
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    texts = [form.written(call, placeholders) for call in calls]
    return {**kept, "content": message["content"] + "".join(texts)}


_NAME: Final = "probe_g"
"""Of the function that was called, not of the tool: templates show both."""
_KEY: Final = "probe_key"
_VALUES: Final = ("probe-v1", "probe-v2")
_RESULTS: Final = ("probe-r1", "probe-r2")
_IDS: Final = ("callprob1", "callprob2")
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "probe_f",
        "description": "A function.",
        "parameters": {"type": "object", "properties": {_KEY: {"type": "string"}}},
    },
}


def _probe() -> list[Message]:
    calls = [
        {"id": name, "type": "function", "function": {"name": _NAME, "arguments": text}}
        for name, text in zip(_IDS, (json.dumps({_KEY: value}) for value in _VALUES), strict=True)
    ]
    results = [
        {"role": "tool", "tool_call_id": name, "content": text}
        for name, text in zip(_IDS, _RESULTS, strict=True)
    ]
    asked = {"role": "user", "content": "Go."}
    turns = [asked, {"role": "assistant", "content": None, "tool_calls": calls}, *results]
    return [Message.model_validate(turn) for turn in turns]


def _shows_all(template: ChatTemplate, style: CallStyle) -> bool:
    messages, placeholders = shown_earlier(_probe(), template.source, style)
    try:
        text = template.render(messages, ChatOptions(tools=[_TOOL], placeholders=placeholders))
    except InvalidRequest:
        return False
    python = f"{{'{_KEY}'"  # an object that was joined to a text
    quoted = f'\\"{_KEY}'  # a text that was written as JSON
    wanted = (_NAME, *_VALUES, *_RESULTS)
    return all(word in text for word in wanted) and python not in text and quoted not in text
