"""The gateway's door: closed without a key, open with one, and only as wide as the key's limits."""

import contextlib
import http.client
import json
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import openai
import pytest
import redis

from precast.system.redis_server import start_redis
from services.gateway.access.quota import LEASE_S
from tests.support.command import precast
from tests.support.gateway_stack import Gateway, Stack, Worker, eventually, running_stack
from tests.support.plain_http import PLAIN

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
GUARDED = (
    *(("POST", path) for path in ("/v1/completions", "/v1/chat/completions", "/nowhere")),
    *(("GET", path) for path in ("/v1/models", "/v1/models/tiny", "/openapi.json", "/")),
)


@dataclass(frozen=True, kw_only=True)
class House:
    """Two gateways that ask for keys of one folder."""

    home: Path
    stack: Stack
    worker: Worker
    doors: tuple[Gateway, Gateway]

    def cli(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        return precast("keys", "api", *arguments, "--home", self.home)

    def key(self, name: str, *flags: str) -> str:
        done = self.cli("create", name, *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def ask(self, key: str, door: int = 0, **changes: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return self.doors[door].post("/v1/chat/completions", json=CHAT | changes, headers=headers)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    home = tmp_path_factory.mktemp("access")
    (home / "keys" / "api").mkdir(parents=True)
    with start_redis(home / "redis") as redis_server, running_stack(redis_server.url, home) as s:
        worker = s.worker(step_ms=10)
        yield House(home=home, stack=s, worker=worker, doors=(s.gateway(), s.gateway()))


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_closed_without_a_key_and_to_a_wrong_one(house: House, method: str, path: str) -> None:
    url = house.doors[0].url + path
    for headers in ({}, {"authorization": "Bearer pk_x"}, {"authorization": "Basic eDp4"}):
        answer = httpx.request(method, url, headers=headers, json=CHAT, timeout=30, verify=PLAIN)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"


def test_anthropics_clients_are_refused_in_their_way(house: House) -> None:
    answer = house.doors[0].post("/v1/messages", json=CHAT)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_a_body_without_a_type_is_no_json_where_keys_are_asked_for(house: House) -> None:
    headers = {"authorization": f"Bearer {house.key('typed')}"}
    answer = house.doors[0].post("/v1/chat/completions", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_load_balancers_need_no_key(house: House) -> None:
    assert [house.doors[0].get(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_openai_and_anthropic_clients_send_it_as_they_do(house: House) -> None:
    key = house.key("client")
    door = house.doors[0]
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key=key, max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
    with (
        openai.OpenAI(base_url=f"{door.url}/v1", api_key=f"{key}x", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    assert door.post("/v1/models", headers={"x-api-key": key}).status_code == 405


def test_a_key_that_is_revoked_opens_nothing_within_a_second(house: House) -> None:
    key = house.key("leaver")
    assert house.ask(key).status_code == 200
    [identifier] = [row["id"] for row in listed(house) if row["name"] == "leaver"]
    assert house.cli("revoke", identifier).returncode == 0
    eventually(lambda: house.ask(key).status_code == 401, 3)


def test_a_key_of_another_scope_is_refused(house: House) -> None:
    answer = house.ask(house.key("operator", "--scope=admin"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "insufficient_permissions")


def listed(house: House) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(house.cli("list", "--json").stdout)
    return rows


def test_lists_show_no_secret(house: House) -> None:
    key = house.key("shown")
    said = house.cli("list").stdout + house.cli("list", "--json").stdout
    assert "shown" in said
    assert key not in said
    assert not any("digest" in row for row in listed(house))


def limited(answer: httpx.Response, what: str) -> bool:
    if answer.status_code != 429:
        return False
    error = answer.json()["error"]
    return (
        error["code"] == "rate_limit_exceeded"
        and what in error["message"]
        and int(answer.headers["retry-after"]) >= 1
    )


def wait_for_a_minute() -> None:
    """Counts start anew with each minute: not amid this test."""
    if (left := 60 - time.time() % 60) < 8:
        time.sleep(left)


def test_gateways_agree_how_many_requests_a_minute_has(house: House) -> None:
    key = house.key("few", "--requests-per-minute=3")
    wait_for_a_minute()
    codes = [house.ask(key, door=number % 2).status_code for number in range(3)]
    assert codes == [200] * 3
    for door in (0, 1):
        assert limited(house.ask(key, door=door), "requests per minute")


def test_tokens_of_prompts_and_answers_count(house: House) -> None:
    used = house.ask(house.key("measured")).json()["usage"]["total_tokens"]
    key = house.key("thrifty", f"--tokens-per-minute={used + 1}")
    wait_for_a_minute()
    assert [house.ask(key, stream=True).status_code for _ in range(2)] == [200] * 2
    assert limited(house.ask(key, door=1), "tokens per minute")


def test_a_burst_at_two_gateways_passes_the_limit_by_one_request_at_most(house: House) -> None:
    expected = house.ask(house.key("sole")).json()["usage"]["prompt_tokens"] + 40
    key = house.key("bursting", f"--tokens-per-minute={4 * expected}")
    wait_for_a_minute()
    with ThreadPoolExecutor(24) as crowd:
        asked = [crowd.submit(house.ask, key, n % 2, max_tokens=40) for n in range(24)]
    answers = [one.result() for one in asked]
    used = [one.json()["usage"]["total_tokens"] for one in answers if one.status_code == 200]
    assert expected <= sum(used) < 5 * expected
    assert all(limited(one, "tokens per minute") for one in answers if one.status_code != 200)
    assert len(used) < len(answers)


def test_what_is_no_generation_counts_as_a_request_too(house: House) -> None:
    key = house.key("wrong", "--tokens-per-minute=1000", "--requests-per-minute=3")
    wait_for_a_minute()
    codes = [house.ask(key, n % 2, model="none").status_code for n in range(3)]
    assert codes == [404] * 3
    assert limited(house.ask(key), "requests per minute")
    assert limited(house.ask(key, model="none"), "requests per minute")  # known at the door now


def test_requests_at_once_are_bounded_and_given_back(house: House) -> None:
    key, running = house.key("narrow", "--max-concurrent=1"), house.worker.running()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", house.doors[0].port)) as held:
        body = json.dumps({"model": "tiny", "prompt": "!silent"})
        held.request("POST", "/v1/completions", body, headers)
        eventually(lambda: house.worker.running() > running)
        assert limited(house.ask(key, door=1), "concurrent requests")
    eventually(lambda: house.ask(key, door=1).status_code == 200)  # its client has left
    assert house.ask(key).status_code == 200  # and this one has ended


def test_slots_of_a_gateway_that_died_come_back(house: House) -> None:
    """Not when its longest request would have ended, but when its lease has: here that is over as
    soon as it is seen to be short."""
    key = house.key("orphan", "--max-concurrent=1")
    mortal = house.stack.gateway()
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "tiny", "prompt": "!silent"}
    running = house.worker.running()
    asking = Thread(target=_ask_in_vain, args=(mortal, body, headers))
    asking.start()
    eventually(lambda: house.worker.running() > running)
    assert limited(house.ask(key), "concurrent requests")
    mortal.kill()
    asking.join()
    [identifier] = [row["id"] for row in listed(house) if row["name"] == "orphan"]
    with redis.Redis.from_url(house.stack.redis_url) as counts:
        place = f"precast:quota:{identifier}:running"
        [(request, end)] = counts.zrange(place, 0, -1, withscores=True)
        assert 0 < end - counts.time()[0] <= LEASE_S + 1
        counts.zadd(place, {request: counts.time()[0] - 1})
    assert house.ask(key).status_code == 200


def _ask_in_vain(gateway: Gateway, body: Any, headers: dict[str, str]) -> None:
    with contextlib.suppress(httpx.TransportError):
        gateway.post("/v1/completions", json=body, headers=headers)


def test_a_large_body_without_a_key_is_told_so(house: House) -> None:
    """All of it is sent before the answer is read, as most clients do it."""
    connection = http.client.HTTPConnection("127.0.0.1", house.doors[0].port, timeout=30)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", body=b" " * (8 << 20), headers=headers)
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (401, "invalid_api_key")
    connection.close()


def test_without_keys_it_warns_who_listens_to_all(
    house: House, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    house.stack.gateway(host="0.0.0.0", api_keys_dir=str(tmp_path / "none"))
    assert "whoever reaches this port may use it" in "".join(capfd.readouterr())
