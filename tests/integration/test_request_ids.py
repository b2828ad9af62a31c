"""Every answer has a request id; the client's own where it sends one."""

import re
from collections.abc import Iterator

import pytest

from precast.system.redis_server import start_redis
from tests.support.gateway_stack import Gateway, Stack, eventually, running_stack

ASK = {"model": "tiny", "prompt": "the fox", "max_tokens": 3}
MADE = re.compile(r"req-[0-9a-f]{32}")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Gateway]]:
    home = tmp_path_factory.mktemp("ids")
    with start_redis(home / "redis") as redis_server, running_stack(redis_server.url, home) as s:
        s.worker()
        yield s, s.gateway()


@pytest.fixture
def gateway(served: tuple[Stack, Gateway]) -> Gateway:
    return served[1]


@pytest.mark.parametrize("stream", [False, True])
def test_the_clients_own_comes_back(gateway: Gateway, stream: bool) -> None:
    headers = {"x-request-id": "order-7:a/b"}
    answer = gateway.post("/v1/completions", json=ASK | {"stream": stream}, headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "order-7:a/b")


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "ä"])
def test_one_is_made_where_there_is_no_good_one(gateway: Gateway, given: str) -> None:
    headers = {"x-request-id": given.encode()} if given else {}
    answers = [gateway.post("/v1/completions", json=ASK, headers=headers) for _ in range(2)]
    names = {answer.headers["x-request-id"] for answer in answers}
    assert len(names) == 2
    assert all(map(MADE.fullmatch, names))


@pytest.mark.parametrize("path", ["/health", "/nowhere", "/v1/models/none"])
def test_refusals_have_one_too(gateway: Gateway, path: str) -> None:
    assert MADE.fullmatch(gateway.get(path).headers["x-request-id"])


def test_the_access_log_names_it_and_nothing_of_the_prompt(
    served: tuple[Stack, Gateway], capfd: pytest.CaptureFixture[str]
) -> None:
    gateway = served[0].gateway(access_log=True, log_format="json")
    secret = "the lazy dog 1234567"
    said = ""

    def logged() -> bool:
        nonlocal said
        said += "".join(capfd.readouterr())
        return any(map(ours, said.splitlines()))

    def ours(line: str) -> bool:
        return '"event": "request"' in line and '"request_id": "audit-1"' in line

    headers = {"x-request-id": "audit-1"}
    gateway.post("/v1/completions", json=ASK | {"prompt": secret}, headers=headers)
    eventually(logged)
    [line] = filter(ours, said.splitlines())
    assert all(part in line for part in ('"path": "/v1/completions"', '"status": 200', '"ms": '))
    assert secret not in said


def test_it_goes_to_the_worker(gateway: Gateway) -> None:
    headers = {"x-request-id": "to-the-end"}
    answer = gateway.post("/v1/completions", json=ASK | {"prompt": "!invalid"}, headers=headers)
    assert "[to-the-end]" in answer.json()["error"]["message"]
