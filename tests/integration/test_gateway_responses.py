"""``/v1/responses``, ``/tokenize`` and the like, through the ``openai`` package and raw HTTP."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from precast import __version__
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.redis_server import start_redis
from tests.support.gateway_stack import Gateway, Stack, make_model_folder, running_stack

THINKING = (
    "{% for m in messages %}{% if m.content != '!later' %}{{ m.role }}: {% endif %}"
    "{{ m.content }}\n"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}\n{% endfor %}{% endfor %}"
    "{% if false %}<think>{% endif %}{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]
ARGUMENTS = '{"city": "Paris"}'
ALL = (
    f'<think>hm</think>Look.<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'
)

WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search"}
BAD_TOOL = {"name": "x", "input_schema": {}}
UNIQUE = {"type": "json_schema", "name": "x", "schema": {"uniqueItems": True}}
"""What the parrot can't hold an answer to."""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("responses")
    with start_redis(folder / "redis") as redis, running_stack(redis.url, folder) as stack:
        make_model_folder(folder / "models", "thinker", template=THINKING)
        stack.worker(max_context_length=4096, model="thinker")
        yield stack


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Gateway:
    return stack.gateway()


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client


def test_a_response(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="thinker", input="!say Hello. !end")
    assert answer.output_text == "Hello."
    assert answer.status == "completed"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_a_response_that_is_cut(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="thinker", instructions="Be kind.", input="hi", max_output_tokens=20
    )
    assert answer.status == "incomplete"
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output_text.startswith("system: Be kind.")


def test_what_labels_a_response_is_in_it(client: openai.OpenAI) -> None:
    labels: Any = {"metadata": {"run": "7"}, "user": "u", "safety_identifier": "s"}
    answer = client.responses.create(model="thinker", input="!say Hi !end", **labels)
    assert {name: getattr(answer, name) for name in labels} == labels
    assert answer.completed_at is not None and answer.completed_at >= answer.created_at
    stream = client.responses.create(model="thinker", input="hi", stream=True, **labels)
    ends: Any = [event for event in stream if "response" in event.model_fields_set]
    assert [event.response.metadata for event in ends] == [{"run": "7"}] * 3
    assert client.responses.create(model="thinker", input="!say Hi !end").metadata == {}


def test_items_of_a_response(client: openai.OpenAI) -> None:
    answer: Any = client.responses.create(model="thinker", input=f"!say {ALL} !end", tools=TOOLS)
    thought, message, call = answer.output
    assert thought.content[0].text == "hm"
    assert message.content[0].text == "Look."
    assert (call.name, call.arguments) == ("weather", ARGUMENTS)


def test_a_streamed_response(client: openai.OpenAI) -> None:
    stream = client.responses.create(
        model="thinker", input=f"!say {ALL} !end", tools=TOOLS, stream=True
    )
    events: Any = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == 3
    assert kinds.count("response.output_item.done") == 3
    told: dict[str, str] = {}
    for event in events:
        if event.type.endswith(".delta"):
            told[event.type] = told.get(event.type, "") + event.delta
    assert told == {
        "response.reasoning_text.delta": "hm",
        "response.output_text.delta": "Look.",
        "response.function_call_arguments.delta": ARGUMENTS,
    }
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call"]
    assert final.usage.output_tokens > 0


class Place(BaseModel):
    city: str


def test_a_parsed_response(client: openai.OpenAI) -> None:
    said = client.responses.parse(
        model="thinker", input=f"!say {ARGUMENTS} !end", text_format=Place
    )
    assert said.output_parsed == Place(city="Paris")


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    first: Any = client.responses.create(model="thinker", input=f"!say {ALL} !end", tools=TOOLS)
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    turns: Any = [{"role": "user", "content": "go"}, *first.output, result]
    answer = client.responses.create(model="thinker", input=turns, max_output_tokens=250)
    assert "user: go\nassistant: Look.\n" in answer.output_text
    assert '"name": "weather", "arguments": {"city": "Paris"}' in answer.output_text
    assert "tool: sunny" in answer.output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": "x" * 50_000}, "input"),
        ({"max_output_tokens": 5000}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": UNIQUE}}, "text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ],
)
def test_errors_name_what_the_client_wrote(gateway: Gateway, fields: Any, param: str) -> None:
    answer = gateway.post("/v1/responses", json={"model": "thinker", "input": "x", **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_an_error_within_a_streamed_response(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="told to fail"):
        list(client.responses.create(model="thinker", input="!later", stream=True))


# --- messages ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_message(gateway: Gateway, stream: bool) -> None:
    tools = [{"name": "weather", "input_schema": PARAMETERS}]
    messages = [{"role": "user", "content": f"!say {ALL} !end"}]
    body = {"model": "thinker", "max_tokens": 500, "messages": messages, "tools": tools}
    answer = gateway.post("/v1/messages", json={**body, "stream": stream})
    assert answer.status_code == 200, answer.text
    if not stream:
        found = answer.json()
        thought, text, call = found["content"]
        assert (thought["thinking"], text["text"]) == ("hm", "Look.")
        assert (call["name"], call["input"]) == ("weather", {"city": "Paris"})
        assert call["id"].startswith("toolu_")
        assert found["stop_reason"] == "tool_use"
        return
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line[:6] == "data: "]
    kinds = [event["type"] for event in events]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3
    told = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(one.get("partial_json", "") for one in told) == ARGUMENTS
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_request_has_the_name_that_anthropics_clients_look_for(gateway: Gateway) -> None:
    for body, status in ((messages("x"), 200), (messages("x", max_tokens=0), 400)):
        answer = gateway.post("/v1/messages", json=body)
        assert answer.status_code == status
        assert answer.headers["request-id"] == answer.headers["x-request-id"] != ""
    other = gateway.post("/v1/responses", json={"model": "thinker", "input": "!say x !end"})
    assert "request-id" not in other.headers and other.headers["x-request-id"]


def test_the_schema_of_a_message_is_held_to(gateway: Gateway) -> None:
    form = {"type": "json_schema", "schema": PARAMETERS}
    turns = [{"role": "user", "content": "!ask"}]
    nothing = {"context_management": {"edits": []}}
    asked = ({"output_config": {"format": form, "effort": "low"}}, {"output_format": form})
    for fields in asked:
        body = messages("", messages=turns, **fields, **nothing)
        answer = gateway.post("/v1/messages", json={**body, "max_tokens": 2000})
        assert answer.status_code == 200, answer.text
        assert "x-precast-ignored-fields" not in answer.headers
        wanted = json.loads(answer.json()["content"][0]["text"])["constraint"]["lark"]
        assert '"properties":{"city":{"type":"string"}}' in wanted
    refused = {"format": {**form, "schema": UNIQUE["schema"]}}
    answer = gateway.post("/v1/messages", json=messages("x", output_config=refused))
    assert answer.status_code == 400
    assert "'output_config.format.schema'" in answer.json()["error"]["message"]


def test_turns_of_a_conversation_of_messages(gateway: Gateway) -> None:
    call = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Paris"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": [{"type": "text", "text": "Look."}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "So?"}]},
    ]
    body = {"model": "thinker", "max_tokens": 260, "system": "Be kind.", "messages": messages}
    said = gateway.post("/v1/messages", json=body).json()["content"][0]["text"]
    assert said.startswith("system: Be kind.\nuser: go\nassistant: Look.\n")
    assert '"name": "weather", "arguments": {"city": "Paris"}' in said
    assert "tool: sunny\nuser: So?" in said


def messages(said: str, **fields: Any) -> dict[str, Any]:
    asked = [{"role": "user", "content": f"!say {said} !end"}]
    return {"model": "thinker", "max_tokens": 100, "messages": asked, **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_sequence_is_named(gateway: Gateway, stream: bool) -> None:
    body = messages("one two three", stop_sequences=["four", "two"], stream=stream)
    answer = gateway.post("/v1/messages", json=body)
    found = answer.json() if not stream else last_delta(answer.text)
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "two")
    whole = gateway.post("/v1/messages", json=messages("one", stop_sequences=["four"])).json()
    assert (whole["stop_reason"], whole["stop_sequence"]) == ("end_turn", None)


def last_delta(text: str) -> Any:
    events = [json.loads(line[6:]) for line in text.splitlines() if line[:6] == "data: "]
    return next(event["delta"] for event in events if event["type"] == "message_delta")


def test_an_answer_that_was_begun_goes_on(gateway: Gateway) -> None:
    """The prompt, which is said again and again, ends within the answer."""
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "On"}]
    body = messages("", messages=turns, max_tokens=30)
    text = gateway.post("/v1/messages", json=body).json()["content"][0]["text"]
    assert text.startswith("user: go\nassistant: Onuser: go")
    count = gateway.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    again = {**body, "messages": [turns[0], {**turns[1], "content": "On and on"}]}
    assert gateway.post("/v1/messages/count_tokens", json=again).json()["input_tokens"] > count


def test_reasoning_that_nobody_can_read_is_left_out(gateway: Gateway) -> None:
    """As Claude's history has it, of a session that goes on here."""
    turns: list[Any] = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": [{"type": "text", "text": "On"}]},
        {"role": "user", "content": "go"},
    ]
    counted = gateway.post("/v1/messages/count_tokens", json=messages("", messages=turns))
    turns[1]["content"].insert(0, {"type": "redacted_thinking", "data": "EmwKAhgB"})
    again = gateway.post("/v1/messages/count_tokens", json=messages("", messages=turns))
    assert again.status_code == 200, again.text
    assert again.json() == counted.json()


def test_tokens_of_messages_are_counted(gateway: Gateway) -> None:
    body = messages("hello", system="Be kind.")
    used = gateway.post("/v1/messages", json=body).json()["usage"]
    del body["max_tokens"]
    counted = gateway.post("/v1/messages/count_tokens", json=body)
    assert counted.json() == {"input_tokens": used["input_tokens"]}


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"model": "none"}, 404, "not_found_error", "'none' does not exist"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "'max_tokens'"),
        ({"max_tokens": 9999}, 400, "invalid_request_error", "maximum context length"),
        ({"tools": [WEB_SEARCH]}, 400, "invalid_request_error", "'tools[0].type'"),
        ({"output_format": {"type": "text"}}, 400, "invalid_request_error", "'output_format.type'"),
        ({"tools": [BAD_TOOL] * 2}, 400, "invalid_request_error", "two functions"),
        ({"messages": [{"role": "user", "content": "!later"}]}, 500, "api_error", "told to fail"),
    ],
)
def test_errors_of_messages_are_anthropics(
    gateway: Gateway, fields: dict[str, Any], status: int, kind: str, words: str
) -> None:
    answer = gateway.post("/v1/messages", json=messages("x", **fields))
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert (found["type"], found["error"]["type"]) == ("error", kind)
    assert words in found["error"]["message"]
    assert gateway.post("/v1/messages/none", json={}).json()["type"] == "error"


# --- tokens ---


def test_tokens_and_back(gateway: Gateway) -> None:
    body = {"model": "thinker", "prompt": "the 🦊", "return_token_strs": True}
    found = gateway.post("/tokenize", json=body).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 4096
    back = gateway.post("/detokenize", json={"model": "thinker", "tokens": found["tokens"]})
    assert back.json() == {"prompt": "the 🦊"}


def test_a_text_without_letters_has_no_tokens(gateway: Gateway) -> None:
    """Who counts tokens counts those of empty texts, too."""
    found = gateway.post("/tokenize", json={"model": "thinker", "prompt": ""}).json()
    assert (found["count"], found["tokens"]) == (0, [])


def test_tokens_of_a_chat(gateway: Gateway) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": "thinker", "messages": messages}
    found = gateway.post("/tokenize", json=body).json()
    chat = gateway.post("/v1/chat/completions", json={**body, "max_tokens": 1}).json()
    assert found["count"] == chat["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "x", "model": "none"}, 404, "model"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens[0]"),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens"),
    ],
)
def test_wrong_questions_about_tokens(
    gateway: Gateway, path: str, body: Any, status: int, param: str
) -> None:
    answer = gateway.post(path, json={"model": "thinker", **body})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_what_a_tokenizer_is(gateway: Gateway) -> None:
    found = gateway.get("/tokenizer_info").json()
    assert (found["model"], found["eos_token"]) == ("thinker", "<end>")
    assert "<think>" in found["chat_template"]
    assert gateway.get("/tokenizer_info?model=none").status_code == 404
    sole = gateway.post("/tokenize", json={"prompt": "the"})
    assert sole.status_code == 200


def test_the_version(gateway: Gateway) -> None:
    assert gateway.get("/version").json() == {"version": __version__}


def test_more_embeddings_than_a_queue_takes_come_in_their_order(client: openai.OpenAI) -> None:
    texts = [chr(33 + number % 90) * (1 + number % 7) for number in range(300)]
    answer = client.embeddings.create(model="thinker", input=texts)
    assert [one.index for one in answer.data] == list(range(300))
    ids = [client.embeddings.create(model="thinker", input=text[0]) for text in texts[:3]]
    assert [one.embedding[0] for one in answer.data[:3]] == [x.data[0].embedding[0] for x in ids]
    assert [one.embedding[1] for one in answer.data] == [len(text) for text in texts]
    assert answer.usage.prompt_tokens == sum(map(len, texts))


def test_how_embeddings_are_pooled_is_a_setting(gateway: Gateway, stack: Stack) -> None:
    body = {"model": "thinker", "input": [1, 2]}
    other = stack.gateway(embedding_pooling="last")
    asked = [
        (gateway, {}),
        (gateway, {"pooling": "last"}),
        (other, {}),
        (other, {"pooling": "mean"}),
    ]
    found = [
        one.post("/v1/embeddings", json=body | more).json()["data"][0]["embedding"][3]
        for one, more in asked
    ]
    assert found == [pb.POOLING_MEAN, pb.POOLING_LAST, pb.POOLING_LAST, pb.POOLING_MEAN]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [[99_999]]}, "input"),
        ({"input": "a" * 5000}, "input"),
        ({"input": [1] * 4097}, "input"),
        ({"input": None}, "input"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 9}, "dimensions"),
        ({"pooling": "cls"}, "pooling"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
def test_embeddings_that_are_refused(gateway: Gateway, changes: Any, param: str) -> None:
    answer = gateway.post("/v1/embeddings", json={"model": "thinker", "input": "a"} | changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
