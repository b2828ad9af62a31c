"""Items of ``/v1/responses`` as the messages of a chat."""

from typing import Any

from services.gateway.openai.responses_api.convert import chat_of
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.tools.formats import FORMATS
from services.gateway.openai.tools.use import tool_use


def thought(text: str | None) -> dict[str, Any]:
    content = None if text is None else [{"type": "reasoning_text", "text": text}]
    return {"type": "reasoning", "id": "rs", "summary": [], "content": content}


def said(text: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "role": "assistant", "status": "completed", "content": content}


def called(name: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c-{name}", "name": name, "arguments": "{}"}


def gave(name: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c-{name}", "output": f"of {name}"}


USER = {"role": "user", "content": "Go."}


def turns(*items: dict[str, Any]) -> list[tuple[str, str, list[str], str | None]]:
    """Each message's role, text, calls and reasoning."""
    chat = chat_of(ResponsesRequest.model_validate({"model": "m", "input": list(items)}))
    return [
        (
            one.role,
            one.text,
            [call.function.name for call in one.tool_calls or ()],
            one.reasoning_content,
        )
        for one in chat.messages
    ]


def test_a_turn_of_the_assistant_is_one_message_with_its_reasoning() -> None:
    assert turns(
        USER, thought("hm"), said("Look."), called("a"), called("b"), gave("b"), gave("a")
    ) == [
        ("user", "Go.", [], None),
        ("assistant", "Look.", ["a", "b"], "hm"),
        ("tool", "of b", [], None),
        ("tool", "of a", [], None),
    ]


def test_turns_follow_each_other_where_no_one_speaks_between_them() -> None:
    assert turns(USER, said("One."), said("Two."), called("a"), thought("hm"), called("b")) == [
        ("user", "Go.", [], None),
        ("assistant", "One.", [], None),
        ("assistant", "Two.", ["a"], None),
        ("assistant", "", ["b"], "hm"),
    ]


def test_the_tools_that_may_be_called_are_some_of_them() -> None:
    tools = [{"type": "function", "name": name} for name in ("a", "b", "c")]
    choice = {"type": "allowed_tools", "mode": "required", "tools": tools[:2]}
    body = {"model": "m", "input": "x", "tools": tools, "tool_choice": choice}
    asked = ResponsesRequest.model_validate(body)
    use = tool_use(chat_of(asked), FORMATS["hermes"])
    assert use is not None and use.mode == "forced"
    assert use.names == {"a", "b"}
    assert asked.model_dump(exclude_unset=True)["tool_choice"] == choice


def test_reasoning_without_an_answer_is_left_out() -> None:
    """As after an answer that was cut; what another server has encrypted is none at all."""
    assert turns(thought("hm"), USER, thought(None), said("Yes."), USER) == [
        ("user", "Go.", [], None),
        ("assistant", "Yes.", [], None),
        ("user", "Go.", [], None),
    ]
