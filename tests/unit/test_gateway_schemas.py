"""What request bodies are accepted, and what is said of the others."""

from typing import Any

import pytest
from pydantic import ValidationError

from services.gateway.openai.errors import from_validation
from services.gateway.openai.schemas import ChatRequest, CompletionRequest

COMPLETION = {"model": "m", "prompt": "p"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def refusal(kind: type[CompletionRequest | ChatRequest], body: Any) -> tuple[str | None, str]:
    """``param`` and message of the error for a body, as the endpoint would answer."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    failures = [{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()]
    error = from_validation(failures)
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
        ("model", None),
        ("model", ""),
        ("model", 5),
        ("n", 0),
        ("n", 129),
        ("n", "2"),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("seed", 1.5),
        ("seed", 2**63),
        ("stop", 5),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", list("abcde")),
        ("stream", "yes"),
        ("stream_options", {"include_usage": "yes"}),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", []),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": "a"}),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", "yes"),
        ("best_of", 2),
        ("ignore_eos", 1),
        ("stop_token_ids", [-1]),
        ("bogus", 1),
    ],
)
def test_wrong_values_are_named(field: str, value: Any) -> None:
    assert refusal(CompletionRequest, {**COMPLETION, field: value})[0] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "auto!"),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["audio"]),
        ("min_p", 0.5),
        ("repetition_penalty", 1.1),
        ("reasoning_effort", "high"),
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
        ("min_p", 0),
        ("user", "me"),
        ("metadata", {"a": "b"}),
        ("store", False),
    ],
)
def test_neutral_values_and_labels_are_accepted(field: str, value: Any) -> None:
    assert ChatRequest.model_validate({**CHAT, field: value}).model == "m"


def test_fields_that_contradict_each_other() -> None:
    echo = {**COMPLETION, "echo": True, "logprobs": 1}
    assert refusal(CompletionRequest, echo)[0] == "echo"
    options = {**COMPLETION, "stream_options": {"include_usage": True}}
    assert refusal(CompletionRequest, options)[0] == "stream_options"
    many = {"model": "m", "prompt": ["a"] * 65, "n": 2}
    assert refusal(CompletionRequest, many)[0] == "n"
    assert refusal(ChatRequest, {**CHAT, "top_logprobs": 1})[0] == "top_logprobs"


def test_missing_fields_are_named() -> None:
    assert refusal(CompletionRequest, {"prompt": "p"})[0] == "model"
    assert refusal(CompletionRequest, {"model": "m"})[0] == "prompt"
    assert refusal(ChatRequest, {"model": "m"})[0] == "messages"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "king", "content": "hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "hi", "mood": "good"}],
    ],
)
def test_wrong_messages(messages: Any) -> None:
    assert refusal(ChatRequest, {"model": "m", "messages": messages})[0] == "messages"


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    body = ChatRequest.model_validate({"model": "m", "messages": messages})
    assert body.messages[0].text == "ab"


@pytest.mark.parametrize("body", [None, [], "text", 5])
def test_a_body_must_be_an_object(body: Any) -> None:
    param, message = refusal(CompletionRequest, body)
    assert param is None
    assert "JSON object" in message
