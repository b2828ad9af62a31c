"""Tools, reasoning, structured output and prompt scoring, as the ``openai`` package sees them.

The parrot says what it is told to, or what it was asked for.
"""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from precast.system.redis_server import start_redis
from services.gateway.openai.harmony import MARKS as HARMONY
from tests.support.gateway_stack import Gateway, make_model_folder, running_stack

QWEN = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}</tools> answer with <tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
GPT_OSS = (
    "{% if tools %}<|start|>developer<|message|>{% for tool in tools %}"
    "{{ tool.function.name }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "{% endif %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments|tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>"
    "{{ m.content }}<|end|>{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CHANNELS = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>"
PARIS = {"city": "Paris"}
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {json.dumps(PARIS)}}}\n</tool_call>'


def tool(name: str, **fields: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/name"}},
        "$defs": {"name": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


TOOLS: Any = [tool("weather", description="Tells the weather."), tool("time")]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Serves ``tiny``, whose template knows no tools, ``qwen`` and ``oss``."""
    folder = tmp_path_factory.mktemp("tools")
    with start_redis(folder / "redis") as redis, running_stack(redis.url, folder) as stack:
        marks = ("<|im_start|>", "<|im_end|>")
        make_model_folder(folder / "models", "qwen", template=QWEN, special=marks)
        make_model_folder(folder / "models", "oss", template=GPT_OSS, special=HARMONY)
        stack.worker(max_context_length=4096)
        stack.worker(max_context_length=4096, model="oss", step_ms=1)
        # A token at a time: what comes together is one delta.
        stack.worker(max_context_length=4096, model="qwen", step_ms=1)
        yield stack.gateway(wait_for=3)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client


def say(text: str) -> Any:
    return [{"role": "user", "content": f"!say {text} !end"}]


def asked(gateway: Gateway, path: str = "/v1/chat/completions", **fields: Any) -> dict[str, Any]:
    """What the worker is asked for."""
    content = {"prompt": "!ask"} if path == "/v1/completions" else {}
    if not content:
        content = {"messages": [{"role": "user", "content": "!ask"}]}
    answer = gateway.post(path, json={"model": "qwen", "max_tokens": 2000, **content, **fields})
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    found: dict[str, Any] = json.loads(
        choice["text"] if path == "/v1/completions" else choice["message"]["content"]
    )
    return found


# --- tools ---


@pytest.mark.parametrize("model", ["tiny", "qwen"])
def test_a_call(client: openai.OpenAI, model: str) -> None:
    text = f"Let me look.\n{CALL}"
    answer = client.chat.completions.create(model=model, messages=say(text), tools=TOOLS)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", PARIS)


@pytest.mark.parametrize("stream", [False, True])
def test_channels_of_gpt_oss(client: openai.OpenAI, stream: bool) -> None:
    """Reasoning, content and calls come apart, and nothing of the marks is left."""
    head = f"{CHANNELS}commentary to=functions.weather <|constrain|>json<|message|>"
    call = head + json.dumps(PARIS)
    plain = oss(client, f"{CHANNELS}final<|message|>Hello.", stream=stream)
    assert (plain.message.content, plain.message.reasoning_content) == ("Hello.", "hm")
    assert plain.finish_reason == "stop"
    called = oss(client, call, stream=stream, tools=TOOLS)
    assert (called.message.content or "", called.message.reasoning_content) == ("", "hm")
    assert called.finish_reason == "tool_calls"
    [found] = called.message.tool_calls
    assert (found.function.name, json.loads(found.function.arguments)) == ("weather", PARIS)


def oss(client: openai.OpenAI, said: str, *, stream: bool, **fields: Any) -> Any:
    """The one choice of a chat."""
    asked: Any = {"model": "oss", "messages": say(said), "max_tokens": 300, **fields}
    if not stream:
        return client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as events:
        final: Any = events.get_final_completion().choices[0]
    return final


def test_what_gpt_oss_is_held_to_and_shown(gateway: Gateway) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    for fields in ({"response_format": schema}, {"tools": TOOLS, "tool_choice": "required"}):
        lark = asked(gateway, model="oss", **fields)["constraint"]["lark"]
        assert "harmony_thought" in lark
    turn = {"role": "assistant", "reasoning_content": "hm", "tool_calls": [WEATHER_CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    messages = [{"role": "user", "content": "go"}, turn, result]
    body = {"model": "oss", "messages": messages, "tools": TOOLS}
    tokens = gateway.post("/tokenize", json=body).json()["tokens"]
    text = gateway.post("/detokenize", json={"model": "oss", "tokens": tokens}).json()["prompt"]
    assert f"{CHANNELS[:-11]} to=functions.weather<|channel|>commentary json" in text


def test_earlier_calls_are_shown_where_nothing_knows_tools(gateway: Gateway) -> None:
    """Neither the template nor the request: an agent's last turn, say."""
    turn = {"role": "assistant", "content": None, "tool_calls": [WEATHER_CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "go"}, turn, result]}
    tokens = gateway.post("/tokenize", json=body).json()["tokens"]
    text = gateway.post("/detokenize", json={"model": "tiny", "tokens": tokens}).json()["prompt"]
    assert '"name": "weather", "arguments": {"city": "Paris"}' in text
    assert "<tool_response>\nsunny" in text


WEATHER_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": json.dumps(PARIS)},
}


@pytest.mark.parametrize("several", [True, False])
def test_streamed_calls(client: openai.OpenAI, several: bool) -> None:
    with client.chat.completions.stream(
        model="qwen", messages=say(CALL + CALL), tools=TOOLS, parallel_tool_calls=several
    ) as stream:
        deltas = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    assert len(deltas) > 3
    assert final.finish_reason == "tool_calls"
    assert final.message.content in (None, "")
    calls = final.message.tool_calls or []
    assert [json.loads(call.function.arguments) for call in calls] == [PARIS] * (1 + several)
    assert len({call.id for call in calls}) == len(calls)


def test_a_text_is_no_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="qwen", messages=say("Hello."), tools=TOOLS)
    choice = answer.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "Hello.")
    assert choice.message.tool_calls is None


def test_without_tools_nothing_is_read(client: openai.OpenAI) -> None:
    for options in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        answer = client.chat.completions.create(model="tiny", messages=say(CALL), **options)
        assert answer.choices[0].message.content == CALL


@pytest.mark.parametrize("stream", [True, False])
def test_turns_of_tools_go_back_into_the_chat(client: openai.OpenAI, stream: bool) -> None:
    """A call as the SDK has it, and its result; the template gets arguments as an object."""
    messages = say(CALL)
    first = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    said = first.choices[0].message
    assert said.tool_calls is not None
    result = {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": "sunny"}
    messages += [said, result]
    again = client.chat.completions.create(
        model="qwen", messages=messages[1:], max_tokens=300, stream=stream
    )
    chunks = list(again) if stream else []
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        if stream
        else again.choices[0].message.content
    )
    assert '{"name": "weather", "arguments": {"city": "Paris"}}' in text
    assert "tool\nsunny" in text


def test_a_template_without_tools_explains_them(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    calls = [{"id": "1", "type": "function", "function": {"name": "time", "arguments": "{}"}}]
    messages += [{"role": "assistant", "content": None, "tool_calls": calls}]
    messages += [{"role": "tool", "tool_call_id": "1", "content": "noon"}]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, max_tokens=905
    )
    said = answer.choices[0].message  # the prompt, whose calls are read as calls
    text = said.content or ""
    assert text.startswith("system: Be kind.\n\nYou may call functions")
    assert '"description": "Tells the weather."' in text
    names = [call.function.name for call in said.tool_calls or ()]
    assert names == ["function_name", "time"]
    assert "user: <tool_response>\nnoon\n</tool_response>" in text


def test_forced_calls(gateway: Gateway, client: openai.OpenAI) -> None:
    wanted = asked(gateway, model="tiny", tools=TOOLS, tool_choice="required")
    schema = json.loads(wanted["constraint"]["json_schema"])
    assert schema["type"] == "array"
    assert [one["properties"]["name"]["const"] for one in schema["items"]["anyOf"]] == [
        "weather",
        "time",
    ]
    reference = schema["$defs"]["tool_1"]["properties"]["city"]["$ref"]
    assert reference == "#/$defs/tool_1/$defs/name"
    named = {"type": "function", "function": {"name": "time"}}
    wanted = asked(gateway, model="tiny", tools=TOOLS, tool_choice=named)
    schema = json.loads(wanted["constraint"]["json_schema"])
    assert schema["properties"]["name"] == {"const": "time"}
    call = {"name": "time", "arguments": PARIS}
    for choice, text in ((named, json.dumps(call)), ("required", json.dumps([call, call]))):
        answer: Any = client.chat.completions.create(
            model="qwen", messages=say(text), tools=TOOLS, tool_choice=choice
        )
        calls = answer.choices[0].message.tool_calls
        assert {call.function.name for call in calls} == {"time"}
        assert len(calls) == (2 if choice == "required" else 1)


def test_strict_tools_have_a_grammar(gateway: Gateway) -> None:
    strict = [tool("weather", strict=True)]
    lark = asked(gateway, tools=strict)["constraint"]["lark"]
    assert '"<tool_call>"' in lark
    assert '"$ref":"#/$defs/name"' in lark
    assert "constraint" not in asked(gateway, tools=TOOLS)
    both = asked(gateway, tools=TOOLS, response_format={"type": "json_object"})
    assert 'answer: %json {"type":"object","x-guidance"' in both["constraint"]["lark"]


# --- reasoning ---

THOUGHT = "<think>\nhm, well\n</think>\n\nYes."


@pytest.mark.parametrize("stream", [True, False])
def test_reasoning(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.chat.completions.create(model="qwen", messages=say(THOUGHT), stream=stream)
    said = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
    assert "".join(getattr(one, "reasoning_content", None) or "" for one in said) == "hm, well"
    assert "".join(one.content or "" for one in said) == "Yes."


def test_reasoning_may_be_left_out_or_off(client: openai.OpenAI) -> None:
    hidden = client.chat.completions.create(
        model="qwen", messages=say(THOUGHT), extra_body={"include_reasoning": False}
    ).choices[0]
    assert (hidden.message.content, getattr(hidden.message, "reasoning_content", None)) == (
        "Yes.",
        None,
    )
    off = client.chat.completions.create(
        model="qwen", messages=say(THOUGHT), reasoning_effort="none"
    )
    assert off.choices[0].message.content == THOUGHT
    plain = client.chat.completions.create(model="tiny", messages=say(THOUGHT))
    assert plain.choices[0].message.content == THOUGHT
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        client.chat.completions.create(model="tiny", messages=say("x"), reasoning_effort="high")


# --- structured output ---

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "constraint"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_schema": '{"type":"object"}'}),
        ({"json_schema": {"type": "null"}}, {"json_schema": '{"type":"null"}'}),
        ({"guided_json": '{"type": "null"}'}, {"json_schema": '{"type":"null"}'}),
        ({"guided_regex": "[a-z]+"}, {"regex": "[a-z]+"}),
        ({"guided_choice": ["a.b", "c"]}, {"regex": r"(a\.b|c)"}),
        ({"guided_grammar": 'start: "a"'}, {"lark": 'start: "a"'}),
        ({"grammar": 'root ::= "a" | [0-9]+'}, {"lark": 'start: "a" | /[0-9]/+\n'}),
        ({"structured_outputs": {"choice": ["yes"]}}, {"regex": "(yes)"}),
        ({"structured_outputs": {"json": {"type": "null"}}}, {"json_schema": '{"type":"null"}'}),
    ],
)
def test_forms_of_answers(gateway: Gateway, fields: Any, constraint: Any) -> None:
    assert asked(gateway, "/v1/completions", **fields).get("constraint") == constraint
    assert asked(gateway, model="tiny", **fields).get("constraint") == constraint


class Named(BaseModel):
    a: int


def test_parse(client: openai.OpenAI, gateway: Gateway) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=say('{"a": 5}'), response_format=Named
    )
    assert answer.choices[0].message.parsed == Named(a=5)
    schema = {"name": "x", "schema": OBJECT, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    wanted = asked(gateway, model="tiny", response_format=form)["constraint"]
    assert json.loads(wanted["json_schema"]) == OBJECT
    behind = asked(gateway, response_format=form)["constraint"]["lark"]
    assert behind.startswith('%llguidance {}\nstart: reasoning? answer\nreasoning: "<think>"')


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"grammar": "root ::= other"}, "grammar"),
        ({"grammar": 'x ::= "a"'}, "grammar"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"guided_regex": "a" * 300_000}, "guided_regex"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, None),
    ],
)
def test_wrong_forms_are_refused(gateway: Gateway, fields: Any, param: str | None) -> None:
    body = {"model": "tiny", "prompt": "x", **fields}
    answer = gateway.post("/v1/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == (param or "response_format.json_schema.name")


def test_a_grammar_that_workers_refuse_names_the_field(gateway: Gateway) -> None:
    schema = {"type": "array", "uniqueItems": True}
    for path, fields, param in (
        ("completions", {"prompt": "x", "guided_json": schema}, "guided_json"),
        (
            "chat/completions",
            {
                "messages": say("x"),
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
    ):
        answer = gateway.post(f"/v1/{path}", json={"model": "tiny", **fields})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == param
        assert error["message"].startswith(f"Invalid '{param}': ")
        assert "not supported: uniqueItems" in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"tools": TOOLS, "grammar": 'root ::= "a"'}, "tools"),
    ],
)
def test_chats_that_contradict_themselves(gateway: Gateway, fields: Any, param: str) -> None:
    body = {"model": "tiny", "messages": say("x"), **fields}
    answer = gateway.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


# --- completions ---


def test_fields_reach_the_worker(gateway: Gateway) -> None:
    wanted = asked(
        gateway,
        "/v1/completions",
        min_p=0.25,
        repetition_penalty=1.5,
        min_tokens=3,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        ignore_eos=True,
        priority=7,
        cache_salt="s",
        stop_token_ids=[5],
    )
    assert wanted["sampling"].items() >= {"min_p": 0.25, "repetition_penalty": 1.5}.items()
    assert wanted["stop"] == {
        "max_tokens": 2000,
        "stop_token_ids": [5],
        "ignore_eos": True,
        "min_tokens": 3,
        "include_stop_string": True,
        "show_special_tokens": True,
    }
    assert (wanted["priority"], wanted["cache_salt"]) == (-7, "s")


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_scored(client: openai.OpenAI, max_tokens: int, stream: bool) -> None:
    """As lm-eval asks for it."""
    answer: Any = client.completions.create(
        model="tiny",
        prompt=[[65, 66, 67], [70, 71]],
        max_tokens=max_tokens,
        echo=True,
        logprobs=1,
        stream=stream,
    )
    chunks = list(answer) if stream else [answer]
    for index, count in ((0, 3), (1, 2)):
        choices = [c for chunk in chunks for c in chunk.choices if c.index == index]
        found = [choice.logprobs for choice in choices if choice.logprobs]
        logprobs = [value for one in found for value in one.token_logprobs]
        assert logprobs == [None, -0.25, -0.5][:count] + [-0.5] * max_tokens
        assert [top is None for one in found for top in one.top_logprobs] == [
            at == 0 for at in range(count + max_tokens)
        ]
        text = "".join(choice.text for choice in choices)
        tokens = [token for one in found for token in one.tokens]
        assert "".join(tokens) == text
        offsets = [offset for one in found for offset in one.text_offset]
        assert offsets == [len("".join(tokens[:at])) for at in range(len(tokens))]


def test_an_echo_without_an_answer(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="the fox", max_tokens=0, echo=True)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == ("the fox", None)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_the_best_of_several(gateway: Gateway, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=["the", "fox"], n=1, best_of=3, max_tokens=4
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 24
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_token_ids(gateway: Gateway, stream: bool) -> None:
    body = {"model": "tiny", "max_tokens": 3, "return_token_ids": True, "stream": stream}
    answer = gateway.post("/v1/completions", json={**body, "prompt": [65, 66]})
    choices = [one["choices"][0] for one in events(answer.text)]
    assert choices[0]["prompt_token_ids"] == [65, 66]
    assert [token for one in choices for token in one.get("token_ids", [])] == [65, 66, 65]
    chat = {**body, "messages": [{"role": "user", "content": "hi"}]}
    found = events(gateway.post("/v1/chat/completions", json=chat).text)
    prompt = found[0]["prompt_token_ids"]
    ids = [token for one in found for token in one["choices"][0].get("token_ids", [])]
    assert ids == prompt[:3]


def events(text: str) -> list[Any]:
    """A body, or the events of a stream."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_long_prompts_may_be_cut(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny",
        prompt=[65, 66, 67],
        max_tokens=2,
        echo=True,
        extra_body={"truncate_prompt_tokens": 2},
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2


def test_a_suffix_needs_a_model_for_it(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="infilling") as caught:
        client.completions.create(model="tiny", prompt="a", suffix="b")
    assert caught.value.param == "suffix"


def test_the_last_message_may_be_continued(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "One, "}]
    answer = client.chat.completions.create(
        model="qwen",
        messages=messages,
        max_tokens=60,
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    text = answer.choices[0].message.content or ""
    assert "assistant\nOne, user" in text.replace("<|im_start|>", "")


def test_unknown_fields_are_named_in_the_answer(gateway: Gateway) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "foo": 1, "a b": 2, "user": "me"}
    answer = gateway.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-precast-ignored-fields"] == "a%20b, foo"
    counted = 'gateway_ignored_fields_total{endpoint="/v1/completions"}'
    assert gateway.metrics()[counted] >= 2
    del body["foo"], body["a b"]
    clean = gateway.post("/v1/completions", json=body)
    assert "x-precast-ignored-fields" not in clean.headers
    assert clean.json()["system_fingerprint"].startswith("fp_")
