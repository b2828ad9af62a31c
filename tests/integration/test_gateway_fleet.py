"""The gateway in front of several workers, and through the loss of any part."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from precast.fleet.leases import DecodeLease, Registry
from precast.system.redis_server import RedisServer, start_redis
from tests.support.gateway_stack import Gateway, Stack, eventually, make_model_folder, running_stack
from tests.support.plain_http import PLAIN

BODY = {"model": "tiny", "prompt": "the fox", "max_tokens": 4}


@pytest.fixture
def stack(redis_url: str, tmp_path: Path) -> Iterator[Stack]:
    with running_stack(redis_url, tmp_path) as stack:
        yield stack


async def post_all(gateway: Gateway, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=30, limits=limits, verify=PLAIN) as client:
        posts = [client.post(f"{gateway.url}/v1/completions", json=body) for body in bodies]
        return await asyncio.gather(*posts)


def complete(gateway: Gateway, **changes: Any) -> httpx.Response:
    return gateway.post("/v1/completions", json={**BODY, **changes})


async def test_requests_are_spread_evenly(stack: Stack) -> None:
    workers = [stack.worker(step_ms=5), stack.worker(step_ms=5)]
    gateway = stack.gateway(wait_for=2)
    answers = await post_all(gateway, [{**BODY, "max_tokens": 20}] * 40)
    assert {answer.status_code for answer in answers} == {200}
    assert [worker.served() for worker in workers] == [20, 20]


async def test_a_busy_worker_gets_less(stack: Stack) -> None:
    busy = stack.worker(worker_id="busy")
    gateway = stack.gateway()
    silent = [gateway.client().completions for _ in range(6)]
    threads = [threading.Thread(target=_ignore_errors, args=(api,), daemon=True) for api in silent]
    for thread in threads:
        thread.start()
    eventually(lambda: busy.running() == 6)
    idle = stack.worker(worker_id="idle", step_ms=2)
    eventually(lambda: gateway.workers() == 2)
    for _ in range(5):
        assert complete(gateway).status_code == 200
    assert (busy.served(), idle.served()) == (6, 5)


def _ignore_errors(completions: Any) -> None:
    try:
        completions.create(model="tiny", prompt="!silent")
    except openai.APIError:
        pass


def test_a_full_worker_passes_its_requests_on(stack: Stack) -> None:
    full = stack.worker(worker_id="a-full", max_running=0)
    other = stack.worker(worker_id="b-fleet-other")
    gateway = stack.gateway(wait_for=2)
    for _ in range(4):
        assert complete(gateway).status_code == 200
    assert (full.served(), other.served()) == (0, 4)
    assert gateway.metrics()['gateway_retries_total{model="tiny"}'] >= 1


def test_all_workers_full_is_429(stack: Stack) -> None:
    stack.worker(max_running=0)
    stack.worker(max_running=0)
    answer = complete(stack.gateway(wait_for=2))
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "overloaded"
    assert answer.headers["retry-after"]


def test_a_worker_killed_mid_stream(stack: Stack) -> None:
    """Its streams, and what isn't streamed, go on at the other one as if nothing had happened."""
    victim = stack.worker(worker_id="a-fleet-victim", step_ms=100)
    gateway = stack.gateway()
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 200, "n": 2, "logprobs": 1}
    wholes: list[openai.types.Completion] = []
    ask = lambda: wholes.append(gateway.client().completions.create(**asked))  # type: ignore[call-overload]  # noqa: E731
    whole = threading.Thread(target=ask)
    whole.start()
    stream = gateway.client().completions.create(  # type: ignore[call-overload]
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = [next(iter(stream))]
    survivor = stack.worker(worker_id="b-fleet-survivor")
    eventually(lambda: gateway.workers() == 2)
    killed = time.monotonic()
    victim.kill()
    chunks += list(stream)
    assert time.monotonic() - killed < 10  # the victim would take 20 s
    whole.join(60)
    usage = chunks.pop().usage
    texts, tokens = ["", ""], [0, 0]
    for choice in (chunk.choices[0] for chunk in chunks):
        texts[choice.index] += choice.text
        tokens[choice.index] += len(choice.logprobs.tokens if choice.logprobs else ())
    undisturbed = gateway.client().completions.create(**asked)  # type: ignore[call-overload]
    for answer in (wholes[0], undisturbed):
        assert [choice.text for choice in answer.choices] == texts
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (
            usage.completion_tokens,
            usage.prompt_tokens,
        )
    assert (tokens, usage.completion_tokens) == ([200, 200], 400)
    before = survivor.served()
    for _ in range(4):  # at once, long before the victim's lease has run out
        assert complete(gateway).status_code == 200
    assert survivor.served() == before + 4
    eventually(lambda: gateway.workers() == 1)


def test_a_request_without_a_token_yet_moves_to_another_worker(stack: Stack) -> None:
    victim = stack.worker(worker_id="a-fleet-victim", step_ms=60_000)
    gateway = stack.gateway()
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(complete(gateway)))
    thread.start()
    eventually(lambda: victim.running() == 1)
    stack.worker(worker_id="b-fleet-survivor")
    eventually(lambda: gateway.workers() == 2)
    victim.kill()
    thread.join(60)
    assert answers[0].status_code == 200


def test_a_request_without_text_yet_moves_to_another_worker(stack: Stack) -> None:
    """Tokens that are no whole character yet are none that a client has seen."""
    tokenizer = Tokenizer.from_file(str(stack.models_dir / "tiny" / "tokenizer.json"))
    begins_an_emoji = tokenizer.token_to_id("ð")
    victim = stack.worker(worker_id="a-fleet-victim", step_ms=100)
    gateway = stack.gateway()
    answers: list[httpx.Response] = []
    changes = {"prompt": [begins_an_emoji], "max_tokens": 200, "stream": True}
    thread = threading.Thread(target=lambda: answers.append(complete(gateway, **changes)))
    thread.start()
    eventually(lambda: victim.running() == 1)
    survivor = stack.worker(worker_id="b-fleet-survivor")
    eventually(lambda: gateway.workers() == 2)  # tokens have come meanwhile
    assert victim.running() == 1
    victim.kill()
    thread.join(60)
    assert answers[0].status_code == 200
    assert "error" not in answers[0].text
    assert survivor.served() == 1


def test_dead_workers_that_are_still_known_cost_no_request(stack: Stack) -> None:
    """More of them than attempts that a request has."""
    victims = [stack.worker(worker_id=f"a-{number}") for number in range(4)]
    gateway = stack.gateway(wait_for=4)
    stack.worker(worker_id="b-fleet-survivor")
    eventually(lambda: gateway.workers() == 5)
    for victim in victims:
        victim.kill()
    for _ in range(3):
        assert complete(gateway).status_code == 200


def test_the_last_worker_killed_and_back(stack: Stack) -> None:
    worker = stack.worker()
    gateway = stack.gateway()
    assert complete(gateway).status_code == 200
    worker.kill()
    eventually(lambda: gateway.get("/ready").status_code == 503)  # one sent before waits for longer
    start = time.monotonic()
    answer = complete(gateway)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_unavailable")
    assert answer.headers["retry-after"]
    assert time.monotonic() - start < 5
    assert gateway.get("/health").status_code == 200
    answer = complete(gateway)  # known, but nobody serves it
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_unavailable")
    stack.worker()
    eventually(lambda: gateway.workers() == 1)
    assert complete(gateway).status_code == 200


async def test_a_worker_that_accepts_and_never_answers(stack: Stack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        registry = Registry.connect(stack.redis_url, lease_ttl_s=60)
        await registry.publish(
            DecodeLease(
                worker_id="mute",
                address=f"127.0.0.1:{mute.getsockname()[1]}",
                model="tiny",
                state="ready",
                max_batch_size=1,
                max_context_length=256,
                weight_dtype="fp32",
                quantization="none",
            )
        )
        await registry.close()
        gateway = stack.gateway(wait_for=0)
        eventually(lambda: gateway.get("/ready").status_code == 200)
        start = time.monotonic()
        answers = await post_all(gateway, [BODY] * 5)
        assert {answer.status_code for answer in answers} == {503}
        assert time.monotonic() - start < 8  # one timeout of 2 s for all of them
        stack.worker()
        eventually(lambda: gateway.workers() == 1)
        answers = await post_all(gateway, [BODY] * 5)
        assert {answer.status_code for answer in answers} == {200}


def test_no_worker_yet(stack: Stack) -> None:
    gateway = stack.gateway(wait_for=0)
    assert gateway.get("/ready").json()["error"]["code"] == "not_ready"
    assert gateway.get("/v1/models").json() == {"object": "list", "data": []}
    assert complete(gateway).status_code == 404


def test_workers_that_are_starting_or_draining_get_nothing(stack: Stack) -> None:
    stack.worker(state="starting")
    stack.worker(state="draining")
    gateway = stack.gateway(wait_for=0)
    eventually(lambda: gateway.get("/v1/models").json()["data"])
    assert complete(gateway).status_code == 503


def test_redis_killed_and_back_empty(
    stack: Stack, redis_server: RedisServer, tmp_path: Path
) -> None:
    stack.worker(lease_ttl_s=1)
    gateway = stack.gateway(constants={"services.gateway.routing.worker.MISSING_GRACE_S": 1})
    redis_server.process.send_signal(signal.SIGKILL)
    redis_server.process.wait()
    end = time.monotonic() + 3  # longer than the lease, and than who has none is kept
    while time.monotonic() < end:
        assert complete(gateway).status_code == 200
        time.sleep(0.1)
    port = int(redis_server.url.rpartition(":")[2].removesuffix("/0"))
    with start_redis(tmp_path / "empty", port):
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            assert complete(gateway).status_code == 200
        stack.worker(worker_id="new")
        eventually(lambda: gateway.workers() == 2)


def test_a_gateway_that_starts_before_redis(tmp_path: Path, redis_server: RedisServer) -> None:
    redis_server.stop()
    with running_stack(redis_server.url, tmp_path) as stack:
        gateway = stack.gateway(wait_for=0)
        assert gateway.get("/ready").status_code == 503
        port = int(redis_server.url.rpartition(":")[2].removesuffix("/0"))
        with start_redis(tmp_path / "redis2", port):
            stack.worker()
            eventually(lambda: gateway.workers() == 1)
            assert complete(gateway).status_code == 200


async def test_requests_beyond_the_bound_are_429(stack: Stack) -> None:
    worker = stack.worker()
    gateway = stack.gateway(max_in_flight=3)
    slow = {**BODY, "prompt": "!slow", "max_tokens": 25}
    running = asyncio.create_task(post_all(gateway, [slow] * 3))
    await asyncio.to_thread(eventually, lambda: worker.running() == 3)
    answers = await post_all(gateway, [BODY] * 5)
    assert [answer.status_code for answer in answers] == [429] * 5
    assert [answer.status_code for answer in await running] == [200] * 3
    refused = answers[0]
    assert refused.json()["error"]["code"] == "overloaded"
    assert refused.headers["retry-after"]
    assert complete(gateway).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_deadline_ends_a_request(stack: Stack, stream: bool) -> None:
    worker = stack.worker(step_ms=100)
    gateway = stack.gateway(request_timeout_s=1)
    assert complete(gateway, max_tokens=1).status_code == 200  # it has read the tokenizer
    answer = complete(gateway, max_tokens=100, stream=stream)
    if stream:  # tokens have come already
        assert answer.status_code == 200
        last = answer.text.strip().rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "timeout"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    eventually(lambda: worker.running() == 0)


def test_two_models_go_to_their_own_workers(stack: Stack) -> None:
    make_model_folder(stack.models_dir, "other")
    tiny, other = stack.worker(), stack.worker(model="other")
    gateway = stack.gateway(wait_for=2)
    for _ in range(3):
        assert complete(gateway, model="other").status_code == 200
    assert (tiny.served(), other.served()) == (0, 3)
    assert [m["id"] for m in gateway.get("/v1/models").json()["data"]] == ["other", "tiny"]
    error = gateway.post("/v1/completions", json={"prompt": "a"}).json()["error"]
    assert error["param"] == "model"
    assert "2 models are served: other, tiny" in error["message"]


def test_a_long_request_goes_to_the_worker_that_can_hold_it(stack: Stack) -> None:
    small, large = stack.worker(max_context_length=64), stack.worker(max_context_length=512)
    gateway = stack.gateway(wait_for=2)
    for _ in range(3):
        assert complete(gateway, max_tokens=100).status_code == 200
    assert (small.served(), large.served()) == (0, 3)
    assert complete(gateway, max_tokens=600).json()["error"]["code"] == "context_length_exceeded"


def test_a_model_folder_without_a_tokenizer(stack: Stack) -> None:
    stack.worker()
    gateway = stack.gateway()
    (stack.models_dir / "tiny" / "tokenizer.json").rename(stack.models_dir / "hidden")
    answer = complete(gateway)
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    (stack.models_dir / "tiny" / "tokenizer.json").write_text("{broken")
    assert complete(gateway).status_code == 500
    (stack.models_dir / "hidden").rename(stack.models_dir / "tiny" / "tokenizer.json")
    assert complete(gateway).status_code == 200


def test_a_stop_lets_requests_finish(stack: Stack) -> None:
    worker = stack.worker(step_ms=200)
    gateway = stack.gateway(drain_timeout_s=30)
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(complete(gateway, max_tokens=8)))
    thread.start()
    eventually(lambda: worker.served() == 1)
    gateway.process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert answers[0].status_code == 200
    assert gateway.process.wait(60) == 0


def test_a_stop_has_a_deadline(stack: Stack) -> None:
    worker = stack.worker()
    gateway = stack.gateway(drain_timeout_s=1)
    thread = threading.Thread(target=_ignore_errors, args=(gateway.client().completions,))
    thread.start()
    eventually(lambda: worker.running() == 1)
    gateway.process.send_signal(signal.SIGTERM)
    assert gateway.process.wait(20) == 0
    thread.join(60)
    eventually(lambda: worker.running() == 0)


def test_a_killed_gateway_frees_its_slots(stack: Stack) -> None:
    worker = stack.worker()
    gateway = stack.gateway()
    thread = threading.Thread(target=_ignore_errors, args=(gateway.client().completions,))
    thread.start()
    eventually(lambda: worker.running() == 1)
    gateway.kill()
    eventually(lambda: worker.running() == 0)
    thread.join(60)
