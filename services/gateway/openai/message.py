"""A whole answer as a message: content, reasoning, calls."""

from msgspec import UNSET

from services.gateway.openai import responses as api
from services.gateway.openai.call_ids import new_call_id
from services.gateway.openai.interpret import AnswerReader
from services.gateway.openai.parts import CallArguments, CallBegun, Content, Part, Reasoning
from services.gateway.openai.plan import Plan


def message_of(text: str, plan: Plan) -> api.ChatMessage:
    """What the text of an answer says."""
    if plan.reading.is_plain:
        return api.ChatMessage(content=text)
    reader = AnswerReader(plan.reading)
    parts = [*reader.feed(text), *reader.end()]
    content = "".join(part.text for part in parts if isinstance(part, Content))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    begun = [part for part in parts if isinstance(part, CallBegun)]
    calls = [_call(one, _arguments(parts, one.index), plan) for one in begun]
    return api.ChatMessage(
        content=content or (None if calls else ""),
        reasoning_content=reasoning or UNSET,
        tool_calls=calls or UNSET,
    )


def _arguments(parts: list[Part], index: int) -> str:
    """Of the call at ``index``."""
    told = (part for part in parts if isinstance(part, CallArguments) and part.index == index)
    return "".join(part.text for part in told)


def _call(begun: CallBegun, arguments: str, plan: Plan) -> api.ToolCall:
    function = api.CalledFunction(name=begun.name, arguments=arguments)
    return api.ToolCall(id=new_call_id(short=plan.short_call_ids), function=function)
