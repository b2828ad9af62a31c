"""What clients see when workers die, hang, restart or lose their leases."""

import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from precast.system.held_folders import put_in_place
from precast.system.redis_server import start_redis
from precast.tokenizer.digest import tokenizer_digest
from services.gateway.routing.breaker import OPENS_AFTER
from tests.support.gateway_stack import Gateway, Stack, Worker, eventually, running_stack
from tests.support.ports import free_port

BODY = {"model": "tiny", "prompt": "the fox", "max_tokens": 4}
HELD_UP_S = 10
"""What a busy machine may take from a process that keeps a deadline."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One Redis and one folder of models for all tests."""
    folder = tmp_path_factory.mktemp("recovery")
    with (
        start_redis(folder / "redis") as redis_server,
        running_stack(redis_server.url, folder) as stack,
    ):
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Iterator[Stack]:
    """The shared stack; what the test starts in it is gone afterwards, its leases too."""
    yield shared
    while shared.started:
        process = shared.started.pop()
        process.kill()
        process.wait()
    redis.Redis.from_url(shared.redis_url).flushall()


@pytest.fixture
def gateway(stack: Stack) -> Gateway:
    """The test's own: one that knew the last test's workers would look for them for seconds."""
    return stack.gateway(wait_for=0, expected_models="tiny")


def complete(gateway: Gateway, **changes: Any) -> httpx.Response:
    return gateway.post("/v1/completions", json={**BODY, **changes})


class Asked:
    """Requests that run in threads; ``answers`` has what came, in the order of its coming."""

    def __init__(self, gateway: Gateway, count: int, **changes: Any) -> None:
        self.answers: list[httpx.Response] = []
        ask: Callable[[], None] = lambda: self.answers.append(complete(gateway, **changes))  # noqa: E731
        self._threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def wait(self, deadline_s: float = 60.0) -> list[httpx.Response]:
        end = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
            assert not thread.is_alive(), f"no answer within {deadline_s} s"
        return self.answers


def last_event(answer: httpx.Response) -> Any:
    return json.loads(answer.text.strip().rpartition("data: ")[2])


def text_of(answer: httpx.Response) -> str:
    """A stream's, which has ended as it should."""
    *events, done = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert done == "[DONE]", events[-1:]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def said(tokens: int) -> str:
    """What a parrot says to ``!slow``, which has four tokens."""
    assert tokens % 4 == 0
    return "!slow" * (tokens // 4)


LONG = 240
"""Tokens that a worker takes 24 s for, to be caught amid them; one with ``slow_ms=0`` none."""


def stream_with_tokens(gateway: Gateway, worker: Worker) -> Asked:
    """A stream of which something was shown."""
    before = worker.said()
    stream = Asked(gateway, 1, prompt="!slow", max_tokens=LONG, stream=True)
    eventually(lambda: worker.said() > before + 2)
    return stream


def test_a_worker_that_gives_its_requests_up_costs_none(stack: Stack, gateway: Gateway) -> None:
    """The worker is the only one: they wait until it is back, and go on where they were."""
    worker = stack.worker(step_ms=60_000)
    eventually(lambda: gateway.workers() == 1)
    whole = Asked(gateway, 1, prompt="!slow", max_tokens=LONG)
    stream = stream_with_tokens(gateway, worker)
    waiting = Asked(gateway, 7)
    eventually(lambda: worker.running() == 9)
    worker.process.send_signal(signal.SIGUSR1)  # its ranks have died
    eventually(lambda: gateway.get("/ready").status_code == 503)
    worker.process.send_signal(signal.SIGUSR2)
    assert [answer.status_code for answer in waiting.wait()] == [200] * 7
    (begun_anew,) = whole.wait()
    assert begun_anew.json()["usage"]["completion_tokens"] == LONG
    assert text_of(stream.wait()[0]) == said(LONG)
    assert gateway.workers() == 1


def test_a_stream_waits_for_room_elsewhere_and_goes_on(stack: Stack, gateway: Gateway) -> None:
    """A request that was never anywhere is told at once that all workers are full; this one was."""
    victim = stack.worker(worker_id="a-victim")
    eventually(lambda: gateway.workers() == 1)
    stream = stream_with_tokens(gateway, victim)
    full = stack.worker(worker_id="b-full", max_running=0)
    eventually(lambda: gateway.workers() == 2)
    victim.kill()
    eventually(lambda: gateway.workers() == 1)
    assert complete(gateway).status_code == 429
    time.sleep(1.0)  # is refused again and again
    survivor = stack.worker(worker_id="c-survivor", slow_ms=0)
    assert text_of(stream.wait()[0]) == said(LONG)
    assert (full.served(), survivor.served()) == (0, 1)


def test_a_worker_that_keeps_failing_is_spared(stack: Stack, gateway: Gateway) -> None:
    failing = stack.worker(worker_id="a-failing")
    eventually(lambda: gateway.workers() == 1)
    for _ in range(OPENS_AFTER + 2):
        assert complete(gateway, prompt="!internal").status_code == 500
    other = stack.worker(worker_id="b-other")
    eventually(lambda: gateway.workers() == 2)
    before = failing.served()
    assert gateway.metrics()["gateway_workers_spared"] == 1
    for _ in range(4):
        assert complete(gateway).status_code == 200
    assert (failing.served() - before, other.served()) == (0, 4)
    other.kill()
    eventually(lambda: gateway.workers() == 1)
    assert complete(gateway).status_code == 200  # where no other one is left


def test_a_chat_stays_where_its_history_is(stack: Stack, gateway: Gateway) -> None:
    workers = [stack.worker(worker_id=f"w{number}") for number in range(2)]
    eventually(lambda: gateway.workers() == 2)
    for number in range(4):
        prompt, homes = [number + 1] * 64, set[int]()
        for turn in range(4):
            before = workers[0].served()
            assert complete(gateway, prompt=prompt).status_code == 200
            homes.add(0 if workers[0].served() > before else 1)
            prompt += [*prompt[:4], 9, turn]  # a parrot's answer, and the next question
        assert len(homes) == 1
    assert [worker.served() for worker in workers] == [8, 8]
    for key in ("one", "other"):  # what they have in common is no whole block
        before = workers[0].served()
        for _ in range(4):
            assert complete(gateway, prompt_cache_key=key).status_code == 200
        assert workers[0].served() - before in (0, 4)


def test_a_worker_that_is_killed_and_comes_back_costs_no_request(
    stack: Stack, gateway: Gateway
) -> None:
    port = free_port()
    worker = stack.worker(port=port, step_ms=60_000)
    eventually(lambda: gateway.workers() == 1)
    waiting = Asked(gateway, 3)
    eventually(lambda: worker.running() == 3)
    worker.kill()
    stack.worker(port=port)
    assert [answer.status_code for answer in waiting.wait()] == [200] * 3


def test_a_worker_that_does_not_come_back_is_503_for_those_that_wait(
    stack: Stack,
) -> None:
    worker = stack.worker(step_ms=60_000)
    gateway = stack.gateway(constants={"services.gateway.serving.LOST_WAIT_S": 2})
    waiting = Asked(gateway, 2)
    eventually(lambda: worker.running() == 2)
    worker.kill()
    answers = waiting.wait()
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"worker_unavailable"}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in answers)


def test_a_stopped_worker_counts_as_dead_within_ten_seconds(stack: Stack, gateway: Gateway) -> None:
    victim = stack.worker(worker_id="a-victim", step_ms=60_000)
    eventually(lambda: gateway.workers() == 1)
    stream = stream_with_tokens(gateway, victim)
    waiting = Asked(gateway, 2)
    eventually(lambda: victim.running() == 3)
    stopped = time.monotonic()
    victim.process.send_signal(signal.SIGSTOP)
    eventually(lambda: gateway.get("/ready").status_code == 503)
    assert time.monotonic() - stopped < 10 + HELD_UP_S
    stack.worker(worker_id="b-survivor", slow_ms=0)  # comes while they wait for the victim
    assert [answer.status_code for answer in waiting.wait()] == [200] * 2
    assert text_of(stream.wait()[0]) == said(LONG)
    victim.process.send_signal(signal.SIGCONT)
    eventually(lambda: gateway.workers() == 2)


def test_a_worker_that_answers_is_alive_whatever_redis_says(stack: Stack) -> None:
    """Its lease lapses all the time, then Redis refuses it; then it is restarted unseen."""
    gateway = stack.gateway(
        wait_for=0,
        expected_models="tiny",
        constants={"services.gateway.routing.worker.MISSING_GRACE_S": 1},
    )
    port = free_port()
    worker = stack.worker(port=port, lease_ttl_s=0.05)
    eventually(lambda: gateway.workers() == 1)
    client = redis.Redis.from_url(stack.redis_url)

    def served_for(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert complete(gateway).status_code == 200
            assert gateway.get("/ready").status_code == 200
            time.sleep(0.1)

    served_for(2)
    client.config_set("maxmemory", "1")
    eventually(lambda: not client.keys("precast:lease:decode:*"))
    served_for(2)
    worker.kill()
    eventually(lambda: gateway.get("/ready").status_code == 503)
    stack.worker(port=port)
    eventually(lambda: gateway.workers() == 1)
    served_for(1)
    client.config_set("maxmemory", "0")
    eventually(lambda: client.keys("precast:lease:decode:*"))
    served_for(1)


def test_discovery_outlives_garbage(stack: Stack, gateway: Gateway) -> None:
    stack.worker()
    eventually(lambda: gateway.workers() == 1)
    client = redis.Redis.from_url(stack.redis_url)
    lease = json.loads(client.get(client.keys("precast:lease:decode:*")[0]))
    garbage: list[dict[str, Any]] = [
        {"max_context_length": 10**9},
        {"model": "../../x\n"},
        {"address": "[::"},
        {"running": "\x00"},
        {"graphs": [{}]},
    ]
    for number, wrong in enumerate(garbage):
        value = json.dumps({**lease, "worker_id": f"bad{number}", **wrong})
        client.set(f"precast:lease:decode:bad{number}", value)
    client.set("precast:lease:decode:nothing", b"\xff\x00")
    client.sadd("precast:leases:decode", *(f"bad{n}" for n in range(9)), b"\xff", "nothing")
    stack.worker(model="tiny", worker_id="found-later")
    eventually(lambda: gateway.workers() == 2)
    models = gateway.get("/v1/models").json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 256)]
    client.delete("precast:leases:decode")
    client.set("precast:leases:decode", "of another type")  # now reading itself fails
    time.sleep(1)
    assert complete(gateway).status_code == 200
    client.delete("precast:leases:decode")
    stack.worker(worker_id="found-last")
    eventually(lambda: gateway.workers() == 3)


def test_a_chat_without_max_tokens_goes_wherever_its_prompt_fits(
    stack: Stack, gateway: Gateway
) -> None:
    small, large = stack.worker(max_context_length=64), stack.worker(max_context_length=256)
    eventually(lambda: gateway.workers() == 2)

    def chat(words: int) -> Any:
        messages = [{"role": "user", "content": "a " * words}]
        body = {"model": "tiny", "messages": messages}
        answer = gateway.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200
        return answer.json()["usage"]

    totals = {chat(4)["total_tokens"] for _ in range(4)}
    assert (small.served(), large.served()) == (2, 2)
    assert totals == {64, 256}
    for _ in range(3):
        assert chat(100)["total_tokens"] == 256
    assert (small.served(), large.served()) == (2, 5)


def test_models_that_are_expected_and_tokenizers_that_differ(
    stack: Stack, gateway: Gateway
) -> None:
    answer = complete(gateway)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "worker_unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert complete(gateway, model="unheard-of").status_code == 404
    other = stack.worker(tokenizer_digest="0" * 32)
    eventually(lambda: gateway.workers() == 1)
    answer = complete(gateway)
    assert answer.status_code == 503
    assert "model files of 'tiny' differ" in answer.json()["error"]["message"]
    same = stack.worker(worker_id="same")
    eventually(lambda: gateway.workers() == 2)
    for _ in range(3):
        assert complete(gateway).status_code == 200
    assert (other.served(), same.served()) == (0, 3)


def test_a_worker_that_goes_on_with_a_replaced_model_is_read_as_before(
    stack: Stack, gateway: Gateway
) -> None:
    folder = stack.models_dir / "tiny"
    stack.worker(tokenizer_digest=tokenizer_digest(folder))
    eventually(lambda: gateway.workers() == 1)
    new = stack.models_dir / ".new"
    shutil.copytree(folder, new)
    (new / "chat_template.jinja").write_text("{{ raise_exception('the new template') }}")
    put_in_place(new, folder)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    assert gateway.post("/v1/chat/completions", json=body).status_code == 200
    stack.worker(worker_id="new", tokenizer_digest=tokenizer_digest(folder))
    eventually(lambda: gateway.workers() == 2)
    answer = gateway.post("/v1/chat/completions", json=body)
    assert "the new template" in answer.json()["error"]["message"]
    (folder / "chat_template.jinja").unlink()


def test_a_stream_that_waits_says_so(stack: Stack) -> None:
    stack.worker()
    gateway = stack.gateway(constants={"services.gateway.openai.streaming.WAITING_S": 1})
    body = json.dumps({**BODY, "prompt": "!silent", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", gateway.port)) as client:
        client.settimeout(30)
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{head}".encode() + body)
        received = b""
        while received.count(b": waiting\n\n") < 2:
            received += client.recv(4096)
    assert received.startswith(b"HTTP/1.1 200 ")


def test_a_stop_ends_requests_once_and_in_openais_shape(
    stack: Stack, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = stack.worker()
    gateway = stack.gateway(drain_timeout_s=2)
    silent = Asked(gateway, 3, prompt="!silent")
    streams = [stream_with_tokens(gateway, worker) for _ in range(2)]
    eventually(lambda: worker.running() == 5)
    short = Asked(gateway, 1, prompt="!slow", max_tokens=12)
    eventually(lambda: worker.served() == 6)
    started = time.monotonic()
    for _ in range(3):  # as from a parent and from a supervisor that end at once
        gateway.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert [answer.status_code for answer in short.wait()] == [200]
    for answer in silent.wait():
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "worker_unavailable"
        assert "shutting down" in answer.json()["error"]["message"]
    for stream in streams:
        assert "shutting down" in last_event(stream.wait()[0])["error"]["message"]
    assert gateway.process.wait(60) == 0
    assert 2 <= time.monotonic() - started < 8 + HELD_UP_S
    eventually(lambda: worker.running() == 0)
    assert not re.search("Traceback|Internal Server Error|Exception", "".join(capfd.readouterr()))


def test_a_worker_without_heartbeats_is_served_through(stack: Stack) -> None:
    """One of an older version: its silence means nothing."""
    worker = stack.worker(heartbeats=0, step_ms=4_000)
    gateway = stack.gateway(constants={"services.gateway.routing.connection.SILENCE_S": 1})
    answer = complete(gateway, max_tokens=1)
    assert (answer.status_code, worker.served()) == (200, 1)


@pytest.mark.parametrize("local", [1, 0])
def test_a_worker_of_this_host_is_served_past_grpc_and_another_over_it(
    stack: Stack, gateway: Gateway, local: int
) -> None:
    def linked() -> int:
        """Sockets of this name: one listens, and each connection has one."""
        return Path("/proc/net/unix").read_text().split().count(f"@precast-{name}/2")

    name = f"w{os.getpid()}-{local}"
    worker = stack.worker(worker_id=name, local=local, step_ms=5)
    eventually(lambda: gateway.workers() == 1)
    if local:
        eventually(lambda: linked() == 2)
    assert linked() == (2 if local else 0)
    answers = [complete(gateway, max_tokens=30, stream=stream) for stream in (True, False)]
    events = re.findall(r'"text":"([^"]*)"', answers[0].text)
    assert "".join(events) == answers[1].json()["choices"][0]["text"]
    stream = stream_with_tokens(gateway, worker)
    worker.kill()
    eventually(lambda: gateway.workers() == 0)
    stack.worker(worker_id=f"{name}-other", local=local, slow_ms=0)
    assert text_of(stream.wait()[0]) == said(LONG)


def test_a_worker_without_columns_is_served_through(stack: Stack, gateway: Gateway) -> None:
    """One of an older version, which sends a message for each token of each request."""
    stack.worker(columns=0, local=0)
    eventually(lambda: gateway.workers() == 1)
    answers = [complete(gateway, max_tokens=9, n=2, logprobs=2, stream=s) for s in (True, False)]
    assert [answer.status_code for answer in answers] == [200, 200]
    events = [json.loads(line[6:]) for line in answers[0].text.split("\n\n") if "choices" in line]
    texts, tokens = ["", ""], [0, 0]
    for choice in (event["choices"][0] for event in events):
        texts[choice["index"]] += choice["text"]
        tokens[choice["index"]] += len((choice["logprobs"] or {"tokens": ()})["tokens"])
    assert texts == [choice["text"] for choice in answers[1].json()["choices"]]
    assert tokens == [9, 9]
    assert complete(gateway, prompt="!invalid").status_code == 400
