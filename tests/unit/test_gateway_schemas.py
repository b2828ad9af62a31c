"""What request bodies are accepted, and what is said of the others."""

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from services.gateway.openai.bodies import named, parse_body
from services.gateway.openai.embeddings.fields import EmbeddingRequest
from services.gateway.openai.errors import ApiError, invalid
from services.gateway.openai.examples import EXAMPLES
from services.gateway.openai.messages_api.fields import MessagesRequest
from services.gateway.openai.parts import CallArguments, CallBegun
from services.gateway.openai.responses_api.fields import ResponsesRequest
from services.gateway.openai.schemas import ChatRequest, CompletionRequest
from services.gateway.openai.structured.constraint import constraint_of
from services.gateway.openai.tools.formats import FORMATS
from services.gateway.openai.tools.use import tool_use

COMPLETION = {"model": "m", "prompt": "p"}
NAMED = {"type": "function", "function": {"name": "weather"}}
NAMED_OTHER = {"type": "function", "function": {"name": "other"}}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refusal(kind: type[CompletionRequest | ChatRequest], body: Any) -> tuple[str | None, str]:
    """``param`` and message of the error for a body, as the endpoint would answer."""
    with pytest.raises(ApiError) as caught:
        parse_body(kind, bytearray(json.dumps(body).encode()))
    error = caught.value
    assert error.status == 400
    assert error.kind == "invalid_request_error"
    return error.param, error.message


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_the_four_forms_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    "prompt",
    [None, 3, {}, [], [[]], ["a", 1], [1, "a"], [-1], [True], [1.5], [[1], "a"], [2**32], [[1], 2]],
)
def test_other_prompts_are_refused(prompt: Any) -> None:
    param, message = refusal(CompletionRequest, {"model": "m", "prompt": prompt})
    assert param == "prompt"
    assert "Invalid 'prompt'" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", 5),
        ("n", 0),
        ("n", 129),
        ("n", "2"),
        ("n", True),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("seed", 1.5),
        ("seed", 2**63),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", ["a"] * 65),
        ("stream", "yes"),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "a"}),
        ("logit_bias", {"1": 10**400}),
        ("logit_bias", {"9" * 5000: 1}),
        ("min_p", False),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", "yes"),
        ("ignore_eos", 1),
        ("cache_salt", 5),
        ("cache_salt", ""),
        ("cache_salt", "x" * 257),
        ("min_p", 1.5),
        ("min_tokens", -1),
        ("repetition_penalty", 0),
        ("truncate_prompt_tokens", -2),
        ("priority", 2**31),
        ("best_of", 0),
        ("n_predict", -2),
        ("repeat_penalty", 0),
        ("prompt_logprobs", -1),
        ("guided_regex", ""),
        ("grammar", 5),
    ],
)
def test_wrong_values_are_named(field: str, value: Any) -> None:
    assert refusal(CompletionRequest, {**COMPLETION, field: value})[0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modalities", ["audio"]),
        ("functions", [{"name": "f"}]),
        ("logits_processors", ["x"]),
        ("mirostat", 2),
        ("use_beam_search", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    param, message = refusal(ChatRequest, {**CHAT, field: value})
    assert param == field
    assert "not supported" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", []),
        ("tools", None),
        ("response_format", {"type": "text"}),
        ("mirostat", 0),
        ("use_beam_search", False),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("store", False),
    ],
)
def test_neutral_values_and_labels_are_accepted(field: str, value: Any) -> None:
    assert ChatRequest.model_validate({**CHAT, field: value}).model == "m"


def test_fields_that_contradict_each_other() -> None:
    assert refusal(ChatRequest, {**CHAT, "max_tokens": 0})[0] == "max_tokens"
    options = {**COMPLETION, "stream_options": {"include_usage": True}}
    assert refusal(CompletionRequest, options)[0] == "stream_options"
    assert refusal(ChatRequest, {**CHAT, "top_logprobs": 1})[0] == "top_logprobs"


def test_missing_fields_are_named() -> None:
    assert refusal(CompletionRequest, {"model": "m"})[0] == "prompt"
    assert refusal(ChatRequest, {"model": "m"})[0] == "messages"


ANSWER: dict[str, Any] = {
    "role": "assistant",
    "content": "hello",
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "tool_calls": None,
    "reasoning_content": "hm",
    "later": {"deep": [1]},
}
"""What SDKs append: every field of the answer's message, whether it has a value or not."""


def test_an_answer_is_accepted_as_a_message() -> None:
    messages = [{"role": "user", "content": "hi"}, ANSWER, {"role": "user", "content": "more"}]
    body, _ = parse_body(
        ChatRequest, bytearray(json.dumps({"model": "m", "messages": messages}).encode())
    )
    assert [message.text for message in body.messages] == ["hi", "hello", "more"]


def test_a_refusal_is_what_the_assistant_said() -> None:
    whole = {"role": "assistant", "content": None, "refusal": "I can't."}
    part = {"role": "assistant", "content": [{"type": "refusal", "refusal": "No.", "id": 1}]}
    body = ChatRequest.model_validate({"model": "m", "messages": [whole, part]})
    assert [message.text for message in body.messages] == ["I can't.", "No."]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        ([{"role": "user", "content": ""}] * 8193, "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "hi"}], "messages[0].role"),
        ([{"role": "king", "content": "hi"}], "messages[0].role"),
        ([{"role": "function", "content": "hi"}], "messages[0].role"),
        ([{"role": "tool"}], "messages[0].content"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([ANSWER, {"role": "assistant", "content": None}], "messages[1].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
        ([ANSWER, {"role": "user", "content": [IMAGE]}], "messages[1].content[0].type"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([{**ANSWER, "tool_calls": [{"id": "1"}]}], "messages[0].tool_calls[0].function"),
        ([{**ANSWER, "function_call": {"name": "f"}}], "messages[0].function_call"),
        ([{**ANSWER, "audio": {"id": "1"}}], "messages[0].audio"),
    ],
)
def test_errors_name_the_path_that_was_written(messages: Any, param: str) -> None:
    found, message = refusal(ChatRequest, {"model": "m", "messages": messages})
    assert found == param
    assert f"'{param}'" in message
    assert not re.search("function-|union|tagged|Input|instance|dictionary|list", message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True, "stream_options": {"include_usage": 3}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"more": 3}}, "stream_options.more"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
    ],
)
def test_paths_into_other_fields(fields: dict[str, Any], param: str) -> None:
    assert refusal(CompletionRequest, {**COMPLETION, **fields})[0] == param


def test_16_0_is_an_integer() -> None:
    fields = {"max_tokens": 16.0, "seed": -3.0, "prompt": [1.0, 2], "stop_token_ids": [5.0]}
    body = CompletionRequest.model_validate({**COMPLETION, **fields})
    assert (body.max_tokens, body.seed, body.prompts, body.stop_token_ids) == (
        16,
        -3,
        [[1, 2]],
        [5],
    )
    assert refusal(CompletionRequest, {**COMPLETION, "max_tokens": -1.0})[0] == "max_tokens"
    assert refusal(CompletionRequest, {**COMPLETION, "prompt": [1.5]})[0] == "prompt"


def test_bounds_are_in_the_reference() -> None:
    properties = CompletionRequest.model_json_schema()["properties"]
    assert {"type": "integer", "minimum": 1, "maximum": 128} in properties["n"]["anyOf"]
    assert properties["best_of"]["anyOf"][0]["minimum"] == 1
    item = properties["stop_token_ids"]["anyOf"][0]["items"]
    assert (item["minimum"], item["exclusiveMaximum"]) == (0, 2**32)


def test_many_and_long_stop_strings() -> None:
    stops = ["x" * 100_000, *(f"stop {index}" for index in range(63))]
    body = bytearray(json.dumps({**COMPLETION, "stop": stops}).encode())
    assert parse_body(CompletionRequest, body)[0].stop == stops


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "not valid JSON"),
        (b'{"model": "m",}', "trailing comma at line 1 column 15"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"model": "\xff"}', "not UTF-8: byte 0xff at position 11"),
        ('{"model": "m"}'.encode("utf-16"), "not UTF-8: byte 0xff at position 0"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 3000, "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a number that is too long"),
        (b'{"model": "\\ud800"}', "broken escape of a character"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_what_is_wrong_with_a_body_is_said(content: bytes, reason: str) -> None:
    with pytest.raises(ApiError, match=reason) as caught:
        parse_body(ChatRequest, bytearray(content))
    assert (caught.value.status, caught.value.param) == (400, None)


def test_a_byte_order_mark_is_skipped() -> None:
    body, _ = parse_body(ChatRequest, bytearray(b"\xef\xbb\xbf" + json.dumps(CHAT).encode()))
    assert body.model == "m"


def test_unknown_fields_are_named_or_refused() -> None:
    content = json.dumps({**COMPLETION, "bogus": 1, "mirostat": 0, "user": "me"}).encode()
    _, unknown = parse_body(CompletionRequest, bytearray(content), strict=False)
    assert unknown == ["bogus"]
    with pytest.raises(ApiError, match="bogus") as caught:
        parse_body(CompletionRequest, bytearray(content), strict=True)
    assert caught.value.param == "bogus"
    assert named(["a b", "\ud800x", "y" * 1000]) == f"a%20b, %3Fx, {'y' * 64}"


@pytest.mark.parametrize(
    ("kind", "body", "field", "neutral", "wrong"),
    [
        (CompletionRequest, COMPLETION, "mirostat", 0, False),
        (ResponsesRequest, {"model": "m", "input": "p"}, "background", False, 0),
        (ResponsesRequest, {"model": "m", "input": "p"}, "truncation", "disabled", "auto"),
        (MessagesRequest, CHAT | {"max_tokens": 1}, "mcp_servers", [], 0),
        (EmbeddingRequest, {"model": "m", "input": "p"}, "embed_dtype", "float32", ""),
    ],
)
def test_only_what_asks_for_nothing_is_dropped(
    kind: type[BaseModel], body: Any, field: str, neutral: Any, wrong: Any
) -> None:
    """By every path alike: false is not 0, and nothing is not null."""
    for value in (None, neutral):
        parse_body(kind, bytearray(json.dumps({**body, field: value}).encode()))
    with pytest.raises(ApiError, match="not supported") as caught:
        parse_body(kind, bytearray(json.dumps({**body, field: wrong}).encode()))
    assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")


def test_messages_of_errors_are_bounded() -> None:
    content = bytearray(json.dumps({**COMPLETION, "x" * 1_000_000: 1}).encode())
    with pytest.raises(ApiError) as caught:
        parse_body(CompletionRequest, content, strict=True)
    body = invalid(caught.value.message, caught.value.param).body()["error"]
    assert len(body["message"]) < 2000
    assert len(body["param"]) < 2000


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    body = ChatRequest.model_validate({"model": "m", "messages": messages})
    assert body.messages[0].text == "ab"


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "choice",
    [
        "auto",
        "none",
        "required",
        {"type": "function", "function": {"name": "weather"}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}},
        None,
    ],
)
def test_choices_of_tools(choice: Any) -> None:
    assert ChatRequest.model_validate({**CHAT, "tools": [WEATHER], "tool_choice": choice}).tools


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [WEATHER], "tool_choice": "auto!"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": 5}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"structured_outputs": {"whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ],
)
def test_tools_and_forms_of_answers_are_checked(fields: dict[str, Any], param: str) -> None:
    found, message = refusal(ChatRequest, {**CHAT, **fields})
    assert found == param, message
    assert f"'{param}'" in message
    assert not re.search("function-|union|tagged|Input|instance|dictionary|list", message)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": NAMED_OTHER}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_tools_that_do_not_go_together(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        tool_use(ChatRequest.model_validate({**CHAT, **fields}), FORMATS["hermes"])
    assert caught.value.param == param


def test_arguments_have_the_types_that_their_tool_asks_for() -> None:
    """Where a model writes bare values."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    body = ChatRequest.model_validate({**CHAT, "tools": [tool]})
    use = tool_use(body, FORMATS["qwen3_coder"])
    assert use is not None
    call = "<tool_call><function=weather><parameter=city>12</parameter></function></tool_call>"
    begun, arguments = use.reader().feed(call)
    assert isinstance(begun, CallBegun)
    assert isinstance(arguments, CallArguments)
    assert (begun.name, json.loads(arguments.text)) == ("weather", {"city": "12"})


@pytest.mark.parametrize("outputs", [{}, {"regex": "a", "choice": ["b"]}, {"json_object": False}])
def test_structured_outputs_has_one_of_its_fields(outputs: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="exactly one of") as caught:
        constraint_of(ChatRequest.model_validate({**CHAT, "structured_outputs": outputs}))
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_as_llama_server_takes_it(kind: str) -> None:
    schema = {"type": "integer", "maximum": 3}
    asked = {"response_format": {"type": kind, "schema": schema}}
    found = constraint_of(ChatRequest.model_validate({**CHAT, **asked}))
    assert found is not None
    assert json.loads(found.json_schema) == schema


@pytest.mark.parametrize("kind", EXAMPLES)
def test_examples_of_the_reference_are_right(kind: type[BaseModel]) -> None:
    for example in EXAMPLES[kind].values():
        _, unknown = parse_body(kind, bytearray(json.dumps(example["value"]).encode()), strict=True)
        assert unknown == []


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_must_be_an_object(body: Any) -> None:
    param, message = refusal(CompletionRequest, body)
    assert param is None
    assert "JSON object" in message
