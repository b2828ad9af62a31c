"""Anthropic's SDK against ``/v1/messages``."""

from typing import Any

import anthropic
import pytest
from conftest import MODEL, say

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOLS: Any = [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize("stream", [False, True])
def test_anthropic(url: str, stream: bool) -> None:
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    messages: Any = [{"role": "user", "content": say(CALL)}]
    options: Any = {"model": MODEL, "max_tokens": 200, "messages": messages, "tools": TOOLS}
    if stream:
        with client.messages.stream(**options) as events:
            answer = events.get_final_message()
    else:
        answer = client.messages.create(**options)
    [call] = answer.content
    assert call.type == "tool_use"
    assert call.input == {"city": "Paris"}
    assert answer.stop_reason == "tool_use"
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**options, "model": "none"})
