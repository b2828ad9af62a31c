"""For chat templates that know no tools: the tools are explained in a message of the system, and
calls are asked for in the way of Hermes, the most widespread one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from services.gateway.openai.tools import hermes

FORMAT: Final = replace(
    hermes.FORMAT,
    name="generic",
    syntax=replace(hermes.SYNTAX, bare=True),
    seen_in=(),
    instructs=True,
)
_INSTRUCTIONS: Final = """\
You may call functions to help with the user's request. These are the functions, as JSON:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": "function_name", "arguments": {{"argument": "value"}}}}
</tool_call>"""
_Message = Mapping[str, Any]


def explained(messages: Sequence[_Message], tools: Sequence[Mapping[str, Any]]) -> list[_Message]:
    """Messages that any template can write: with the tools in the system's message, and calls and
    their results as text. Results of one turn are one message of the user, with what the user says
    behind them: many templates want turns to alternate."""
    plain: list[_Message] = []
    after_result = False
    for message in messages:
        shown, is_result = _as_text(message), message["role"] == "tool"
        if after_result and shown["role"] == "user":
            plain[-1] = {**plain[-1], "content": f"{plain[-1]['content']}\n{shown['content']}"}
        else:
            plain.append(shown)
        after_result = is_result
    if not tools:
        return plain
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=lines)
    if plain and plain[0]["role"] == "system":
        said = plain[0]["content"]
        return [{**plain[0], "content": f"{said}\n\n{text}" if said else text}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def in_users_words(messages: Sequence[_Message]) -> list[_Message]:
    """The same for a template that refuses the system's message, which is the first: its text is in
    front of what the user says first."""
    text, turns = messages[0]["content"], list(messages[1:])
    for place, turn in enumerate(turns):
        if turn["role"] == "user":
            turns[place] = {**turn, "content": f"{text}\n\n{turn['content']}"}
            return turns
    return [{"role": "user", "content": text}, *turns]


def _as_text(message: _Message) -> _Message:
    if message["role"] == "tool":
        text = f"<tool_response>\n{message['content']}\n</tool_response>"
        return {"role": "user", "content": text}
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [message["content"]] if message["content"] else []
    texts += [FORMAT.written(call["function"]) for call in calls]
    return {"role": message["role"], "content": "\n".join(texts)}
