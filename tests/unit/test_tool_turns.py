"""Earlier calls and their results, as strict chat templates take them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from precast.tokenizer.model_tokenizer import TokenizerStore
from services.gateway.openai.call_ids import short_call_id
from services.gateway.openai.errors import ApiError
from services.gateway.openai.lengths import LimitedTokenizer, make_gate
from services.gateway.openai.prompts import chat_prompt
from services.gateway.openai.schemas import ChatRequest
from services.gateway.openai.template_messages import template_messages
from services.gateway.openai.tools.formats import format_of
from services.gateway.openai.tools.generic import explained
from services.gateway.openai.tools.shown import with_descriptions, with_tools
from services.gateway.openai.tools.use import tool_use
from tests.support.tokenizers import byte_level

ALTERNATING = (
    "{% for m in messages if m.role != 'system' %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
"""As of Gemma 3."""
NINE = (
    "{% for m in messages %}{% for call in m.tool_calls or [] %}"
    "{% if call.id|length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    "{{ call.id }}{% endfor %}{% if m.role == 'tool' %}"
    "{% if m.tool_call_id|length != 9 %}{{ raise_exception('nine!') }}{% endif %}"
    "={{ m.tool_call_id }}{% endif %}{% endfor %}"
)
"""As of Mistral 7B 0.3."""


def call(call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}


def result(call_id: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


CALLS = {"role": "assistant", "content": None, "tool_calls": [call("c1", "f"), call("c2", "g")]}
TURNS: list[Any] = [
    {"role": "user", "content": "go"},
    *(CALLS, result("c1", "one"), result("c2", "two")),
    {"role": "user", "content": "So?"},
]


def rendered(messages: Any, template: str) -> str:
    (text,), _ = render_jinja_template([messages], chat_template=template)
    return str(text)


def turns(template: str) -> Any:
    body = ChatRequest.model_validate({"model": "m", "messages": TURNS})
    return template_messages(body.messages, template)


@pytest.mark.parametrize("tools", [[], [{"type": "function", "function": {"name": "f"}}]])
def test_results_of_several_calls_are_one_turn(tools: list[Any]) -> None:
    text = rendered(explained(turns(ALTERNATING), tools), ALTERNATING)
    assert text.count("[user]") == 2
    told = text.index("\none\n"), text.index("\ntwo\n"), text.index("So?")
    assert list(told) == sorted(told)


NO_SYSTEM = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
"""As of Mistral 7B 0.2 and Gemma 2."""


async def prompt_of(folder: Path, *messages: Any) -> str:
    """With a tool, as the model gets it."""
    byte_level(("<end>",)).save(str(folder / "tokenizer.json"))
    config = {"chat_template": NO_SYSTEM}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = await TokenizerStore(folder.parent).get(folder.name)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    body = ChatRequest.model_validate({"model": "m", "messages": [*messages], "tools": tools})
    limited = LimitedTokenizer(tokenizer, 4096, make_gate())
    use = tool_use(body, format_of(NO_SYSTEM, "auto"))
    prompt = await chat_prompt(body, tokenizer, limited, use, allow_control_tokens=False)
    return prompt.text


async def test_tools_are_explained_where_no_system_message_is_taken(tmp_path: Path) -> None:
    text = await prompt_of(tmp_path, *TURNS)
    assert text.startswith("[user]You may call functions")
    assert text.index("weather") < text.index("</tool_call>\n\ngo[assistant]<tool_call>")
    assert text.endswith("So?")


async def test_a_system_message_of_the_client_s_is_still_refused(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="roles must alternate"):
        await prompt_of(tmp_path, {"role": "system", "content": "Be kind."}, *TURNS)


PHI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and "
    "message['tools'] is not none %}<|system|>{{ message['content'] }}<|tool|>"
    "{{ message['tools'] }}<|/tool|><|end|>{% else %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
)
"""As of Phi-4-mini."""
OSS = "{% for tool in tools %}{{- '// ' + tool.function.description + '\\n' }}{% endfor %}"
"""As of gpt-oss."""
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be kind."}]])
def test_tools_are_where_the_template_looks_for_them(system: list[Any]) -> None:
    messages = [*system, {"role": "user", "content": "go"}]
    text = rendered(with_tools(messages, [WEATHER], PHI), PHI)
    assert text.startswith("<|system|>Be kind.<|tool|>" if system else "<|system|>You are")
    assert '<|tool|>[{"name": "weather", "parameters": {}}]<|/tool|><|end|><|user|>go' in text
    assert with_tools(messages, [WEATHER], ALTERNATING) == messages
    assert with_tools(messages, [], PHI) == messages


def test_a_tool_without_a_description_is_shown_by_templates_that_want_one() -> None:
    tools: Any = with_descriptions([WEATHER], OSS)
    (text,), _ = render_jinja_template([TURNS[:1]], tools=tools, chat_template=OSS)
    assert text == "// \n"
    assert with_descriptions([WEATHER], PHI) == [WEATHER]


def test_ids_of_calls_are_as_long_as_the_template_wants() -> None:
    text = rendered(turns(NINE), NINE)
    assert text == "{0}{1}={0}={1}".format(*map(short_call_id, ("c1", "c2")))
    assert rendered(turns(NINE), NINE.replace("!=", "<")) == text
    assert turns(NINE.replace("!=", "<")) == turns(NINE)
    assert short_call_id("abcdefGH1") == "abcdefGH1"
    shown = json.dumps(turns(ALTERNATING))
    assert '"c1"' in shown
