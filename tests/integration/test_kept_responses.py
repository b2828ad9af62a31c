"""Responses that are kept, and go on: for those whose they are, as long and as many as is set."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from precast.access.api_keys import NewKey, create
from precast.system.redis_server import RedisServer, start_redis
from tests.support.gateway_stack import Gateway, Stack, eventually, make_model_folder, running_stack
from tests.support.plain_http import PLAIN

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}\n{% endfor %}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
)
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": {"type": "object"}}]
MODEL = "talker"
ROOM_MB = 1


def say(text: str) -> str:
    """What the parrot answers with this text."""
    return f"!say {text} !end"


@dataclass(frozen=True, kw_only=True)
class House:
    redis: RedisServer
    stack: Stack
    gateway: Gateway
    """Keeps responses."""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("kept")
    with start_redis(folder / "redis") as redis, running_stack(redis.url, folder) as stack:
        make_model_folder(folder / "models", MODEL, template=TEMPLATE)
        stack.worker(max_context_length=4096, model=MODEL)
        gateway = stack.gateway(responses_lifetime_s=600, responses_max_mb=ROOM_MB)
        yield House(redis=redis, stack=stack, gateway=gateway)


@pytest.fixture
def client(house: House) -> Iterator[openai.OpenAI]:
    with house.gateway.client() as client:
        yield client


def test_a_conversation_goes_on(client: openai.OpenAI) -> None:
    """What was said is there, and the instructions, which are of one response alone, are not."""
    first = client.responses.create(
        model=MODEL, input="hi", instructions="Be kind.", max_output_tokens=16
    )
    assert first.model_dump()["store"] is True
    items: Any = [{"role": "user", "content": "And you?"}]
    second = client.responses.create(
        model=MODEL, input=items, previous_response_id=first.id, max_output_tokens=200
    )
    assert second.previous_response_id == first.id
    said = f"user: hi\nassistant: {first.output_text}\nuser: And you?\n"
    assert second.output_text.startswith(said)
    third = client.responses.create(model=MODEL, input=say("Bye."), previous_response_id=second.id)
    assert third.output_text == "Bye."


def test_tools_and_streams_are_kept_too(client: openai.OpenAI) -> None:
    stream = client.responses.create(model=MODEL, input=say(CALL), tools=TOOLS, stream=True)
    *_, last = stream
    assert last.type == "response.completed"
    [call] = last.response.output
    assert call.type == "function_call"
    output = {"type": "function_call_output", "call_id": call.call_id, "output": say("Sun.")}
    answer = client.responses.create(
        model=MODEL,
        input=[output],  # type: ignore[list-item]
        previous_response_id=last.response.id,
        max_output_tokens=250,
    )
    assert answer.output_text == "Sun."
    assert client.responses.retrieve(last.response.id).output == last.response.output


def test_shown_deleted_and_not_kept(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input=say("Hello."))
    assert client.responses.retrieve(made.id).output_text == "Hello."
    client.responses.delete(made.id)
    for gone in (made.id, f"resp_{'0' * 32}", "x:y*"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(gone)
    unkept = client.responses.create(model=MODEL, input=say("Hello."), store=False)
    assert unkept.model_dump()["store"] is False
    for missing in (made.id, unkept.id):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=MODEL, input="x", previous_response_id=missing)
        assert refused.value.code == "previous_response_not_found"
        assert refused.value.param == "previous_response_id"


def test_the_oldest_make_way(house: House, client: openai.OpenAI) -> None:
    """Of a tenant's room; what is larger than all of it is an answer all the same."""
    text = "x" * 300_000
    item = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}
    turn = {"role": "user", "content": say("Yes.")}

    def ask(count: int) -> openai.types.responses.Response:
        return client.responses.create(model=MODEL, input=[*[item] * count, turn])  # type: ignore[list-item]

    made = [ask(1).id for _ in range(5)]
    found = [house.gateway.get(f"/v1/responses/{name}").status_code for name in made]
    assert found == [404, 404, 200, 200, 200]
    large = ask(4)
    assert large.output_text == "Yes."
    assert house.gateway.get(f"/v1/responses/{large.id}").status_code == 404
    client.responses.delete(made[-1])
    assert house.gateway.get(f"/v1/responses/{ask(1).id}").status_code == 200
    assert house.gateway.get(f"/v1/responses/{made[-2]}").status_code == 200


def test_tenants_see_their_own_alone(house: House, tmp_path: Path) -> None:
    keys = [create(tmp_path, NewKey(name=name))[0] for name in ("one", "other")]
    gateway = house.stack.gateway(responses_lifetime_s=600, api_keys_dir=str(tmp_path))
    url = f"{gateway.url}/v1/responses"
    mine, others = ({"authorization": f"Bearer {key}"} for key in keys)
    body = {"model": MODEL, "input": say("Hello.")}
    made = httpx.post(url, json=body, headers=mine, timeout=30, verify=PLAIN).json()["id"]
    goes_on = body | {"previous_response_id": made}
    assert httpx.get(f"{url}/{made}", verify=PLAIN).status_code == 401
    assert httpx.get(f"{url}/{made}", headers=others, verify=PLAIN).status_code == 404
    assert httpx.delete(f"{url}/{made}", headers=others, verify=PLAIN).status_code == 404
    assert (
        httpx.post(url, json=goes_on, headers=others, timeout=30, verify=PLAIN).status_code == 400
    )
    assert house.gateway.get(f"/v1/responses/{made}").status_code == 404
    assert httpx.get(f"{url}/{made}", headers=mine, verify=PLAIN).status_code == 200
    assert httpx.post(url, json=goes_on, headers=mine, timeout=30, verify=PLAIN).status_code == 200


def test_they_end_with_their_time(house: House) -> None:
    gateway = house.stack.gateway(responses_lifetime_s=1)
    made = gateway.post("/v1/responses", json={"model": MODEL, "input": say("a")}).json()
    path = f"/v1/responses/{made['id']}"
    eventually(lambda: gateway.get(path).status_code == 404)


def test_a_reference_tells_of_it_where_it_is(house: House) -> None:
    gateway = house.stack.gateway()
    refused = gateway.post(
        "/v1/responses", json={"model": MODEL, "input": "a", "previous_response_id": "resp_1"}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_parameter")
    fields = [
        json.loads(one.get("/openapi.json").text)["components"]["schemas"]["ResponsesRequest"]
        for one in (gateway, house.gateway)
    ]
    told = ["previous_response_id" in one["properties"] for one in fields]
    assert told == [False, True]


def test_without_redis_only_what_needs_it_fails(house: House) -> None:
    """The last test: nothing is kept after it."""
    made = house.gateway.post("/v1/responses", json={"model": MODEL, "input": say("Hello.")}).json()
    house.redis.process.kill()
    house.redis.process.wait()
    body = {"model": MODEL, "input": say("Hello.")}
    answer = house.gateway.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    again = house.gateway.post("/v1/responses", json=body | {"previous_response_id": made["id"]})
    assert again.status_code == 503
    assert "can't be reached" in again.json()["error"]["message"]
    assert int(again.headers["retry-after"]) >= 1
    shown = house.gateway.get(f"/v1/responses/{made['id']}")
    assert (shown.status_code, shown.json()["error"]["type"]) == (503, "server_error")
