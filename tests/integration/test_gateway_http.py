"""What clients do to a connection: raw sockets, for HTTP libraries hide it."""

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.system.redis_server import start_redis
from tests.support.gateway_stack import Gateway, Worker, eventually, running_stack
from tests.support.plain_http import PLAIN

BODY = {"model": "tiny", "prompt": "the fox", "max_tokens": 4}
HEADER_TIMEOUT_S = 5
CONSTANTS = {
    "services.gateway.main._HEADER_TIMEOUT_S": HEADER_TIMEOUT_S,
    "services.gateway.http.protocol._UNREAD_S": 2,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Worker]]:
    folder = tmp_path_factory.mktemp("http")
    with start_redis(folder / "redis") as redis, running_stack(redis.url, folder) as stack:
        worker = stack.worker(step_ms=1)
        yield stack.gateway(constants=CONSTANTS), worker


@pytest.fixture
def gateway(parts: tuple[Gateway, Worker]) -> Gateway:
    return parts[0]


@pytest.fixture
def worker(parts: tuple[Gateway, Worker]) -> Worker:
    return parts[1]


def post(version: str = "1.1", **changes: Any) -> bytes:
    body = json.dumps({**BODY, **changes})
    head = f"POST /v1/completions HTTP/{version}\r\nHost: x\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{body}".encode()


def exchange(gateway: Gateway, sent: bytes, *, half_close: bool = False) -> bytes:
    """All that comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(sent)
        if half_close:
            connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


def split(answer: bytes) -> tuple[str, dict[str, str], bytes]:
    """Status line, headers, body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return first, dict(line.lower().split(": ", 1) for line in lines), body


# --- clients that do things their own way ---


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("prompt", ["the fox", "!slow fox"])
def test_a_half_closed_client_gets_its_answer(gateway: Gateway, version: str, prompt: str) -> None:
    """As ``nc -N`` does it: nothing more is sent, but the answer is read."""
    answer = exchange(gateway, post(version, prompt=prompt, max_tokens=9), half_close=True)
    status, headers, body = split(answer)
    assert status == "HTTP/1.1 200 OK"
    assert headers["connection"] == "close"
    assert json.loads(body)["usage"]["completion_tokens"] == 9


def test_a_half_closed_client_gets_its_stream(gateway: Gateway) -> None:
    sent = post(prompt="!slow fox", stream=True, max_tokens=9)
    _, headers, body = split(exchange(gateway, sent, half_close=True))
    assert headers["content-type"].startswith("text/event-stream")
    assert body.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_a_half_closed_client_gets_what_it_asked_for_before(gateway: Gateway) -> None:
    answer = exchange(gateway, post() + post(max_tokens=5) + post(max_tokens=6), half_close=True)
    assert [answer.count(b'"completion_tokens":%d' % count) for count in (4, 5, 6)] == [1, 1, 1]


def test_half_a_body_and_the_end_is_no_request(gateway: Gateway) -> None:
    assert exchange(gateway, post()[:-5], half_close=True) == b""


def test_a_half_closed_client_that_leaves_frees_its_slot(gateway: Gateway, worker: Worker) -> None:
    eventually(lambda: worker.running() == 0)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(post(prompt="!silent"))
        connection.shutdown(socket.SHUT_WR)
        eventually(lambda: worker.running() == 1)
        time.sleep(0.5)
        assert worker.running() == 1
    eventually(lambda: worker.running() == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(gateway: Gateway, stream: bool) -> None:
    status, headers, body = split(exchange(gateway, post("1.0", stream=stream)))
    assert status == "HTTP/1.1 200 OK"
    assert "transfer-encoding" not in headers
    assert headers["connection"] == "close"
    if stream:
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert len(body) == int(headers["content-length"])


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/tiny", "/nothing"])
def test_head_is_get_without_a_body(gateway: Gateway, path: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    answers = []
    for method in ("GET", "HEAD", "GET"):
        connection.request(method, path)
        answer = connection.getresponse()
        headers = dict(answer.getheaders())
        for of_this_one in ("date", "x-request-id"):
            del headers[of_this_one]
        answers.append((answer.status, headers, answer.read()))
    connection.close()
    assert answers[0] == answers[2]
    assert answers[1] == (answers[0][0], answers[0][1], b"")


def test_slashes_at_the_end(gateway: Gateway) -> None:
    for path in ("/v1/models/", "/v1/models/tiny/", "/health/", "/v1/models//"):
        assert gateway.get(path).json() == gateway.get(path.rstrip("/")).json()
    assert gateway.post("/v1/completions/", json=BODY).status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 100_000, 431),
        (b"GET /" + b"x" * 100_000, 431),
    ],
)
def test_what_is_not_http_gets_an_error_of_ours(gateway: Gateway, sent: bytes, status: int) -> None:
    first, headers, body = split(exchange(gateway, sent))
    assert first.startswith(f"HTTP/1.1 {status} ")
    assert headers["content-type"] == "application/json"
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_a_client_that_sends_too_much_reads_why(gateway: Gateway) -> None:
    """All of it is sent before the answer is read."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    connection.request("POST", "/v1/completions", body=b"x" * (12 << 20))
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v1/completions", {"content-type": "text/plain"}, 415),
        ("/v1/completions", {"content-type": "application/json", "content-encoding": "br"}, 415),
        ("/nothing", {"content-type": "application/json"}, 404),
        ("/v1/models", {"content-type": "application/json"}, 405),
    ],
)
def test_a_large_body_that_nobody_wants_is_told_why(
    gateway: Gateway, path: str, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    connection.request("POST", path, body=b" " * (7 << 20), headers=headers)
    answer = connection.getresponse()
    assert (answer.status, "message" in json.loads(answer.read())["error"]) == (status, True)
    connection.close()


@pytest.mark.parametrize("line", [b"GET /%b HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nX: %b\r\n\r\n"])
def test_a_client_whose_headers_are_too_long_reads_so(gateway: Gateway, line: bytes) -> None:
    """All of them are sent before the answer is read."""
    first, _, body = split(exchange(gateway, line % (b"x" * (3 << 20))))
    assert first.startswith("HTTP/1.1 431 ")
    assert "larger than 65536 bytes" in json.loads(body)["error"]["message"]


# --- clients that mean harm ---


@pytest.mark.parametrize("end", [b"GET / HTTP/1.1\r\nX: ", b""], ids=["next request", "trailer"])
def test_headers_behind_a_request_are_bounded(gateway: Gateway, worker: Worker, end: bytes) -> None:
    """What comes while a request is answered, or behind its last chunk, is no body."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = json.dumps({**BODY, "prompt": "!silent", "stream": True}).encode()
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    before = _reset_peak(gateway)
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=30) as connection:
        connection.sendall(head + chunk + (b"\r\n" + end if end else b"X: "))
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            for _ in range(64):
                connection.sendall(b"x" * (1 << 20))
                time.sleep(0.01)
    assert _peak(gateway) - before < 30 << 20
    eventually(lambda: worker.running() == 0)


def test_slow_clients_are_cut_off_and_nobody_notices(gateway: Gateway) -> None:
    """200 connections with half a request each, some of which go on byte by byte."""
    started = time.monotonic()
    with ExitStack() as held:
        slow = [
            held.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=60))
            for _ in range(200)
        ]
        for index, connection in enumerate(slow):
            connection.sendall((b"", b"POST /v1/completions HTTP/1.1\r\nX-A: ", b"G")[index % 3])
        dripping = threading.Thread(target=_drip, args=(slow[1::3],), daemon=True)
        dripping.start()
        latencies = [_latency(gateway) for _ in range(20)]
        for connection in slow:
            connection.settimeout(40 - (time.monotonic() - started))
            _read_to_the_end(connection)
        took = time.monotonic() - started
        dripping.join()
        latencies += [_latency(gateway) for _ in range(20)]
    assert HEADER_TIMEOUT_S - 1 < took < 40
    assert max(latencies) < HEADER_TIMEOUT_S / 2, "others noticed"


def _drip(connections: list[socket.socket]) -> None:
    """A byte a second each, until the server has had enough."""
    left = list(connections)
    while left:
        time.sleep(1)
        for connection in list(left):
            try:
                connection.sendall(b"x")
            except OSError:
                left.remove(connection)


def _latency(gateway: Gateway) -> float:
    started = time.monotonic()
    assert gateway.post("/v1/completions", json=BODY).status_code == 200
    return time.monotonic() - started


def _read_to_the_end(connection: socket.socket) -> None:
    try:
        while connection.recv(4096):
            pass
    except ConnectionError:
        pass


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a " * 3_900_000},
        {"prompt": ["é" * 3_900_000]},
        {"prompt": [999] * 1_600_000},
        {"messages": [{"role": "user", "content": "a " * 3_900_000}]},
        {"messages": [{"role": "user", "content": ""}] * 220_000},
    ],
    ids=["prompt", "list", "ids", "chat", "messages"],
)
def test_what_is_far_too_long_costs_little(gateway: Gateway, fields: dict[str, Any]) -> None:
    """Four bodies of 8 MB at once: refused by their length, within a second and 64 MB."""
    path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
    body = json.dumps({"model": "tiny", **fields}, ensure_ascii=False).encode()
    assert 5_000_000 < len(body) < 8 << 20
    assert gateway.post("/v1/completions", json=BODY).status_code == 200
    process = psutil.Process(gateway.process.pid)
    before, peak_before = _cpu(process), _reset_peak(gateway)
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda _: _send(gateway, path, body), range(4)))
    cpu, peak = _cpu(process) - before, _peak(gateway) - peak_before
    assert {answer.status_code for answer in answers} == {400}
    reasons = {answer.json()["error"]["message"] for answer in answers}
    assert len(reasons) == 1
    assert re.search("maximum context length|more than 131072 values", reasons.pop())
    assert peak < 64 << 20
    assert cpu < 1


def _send(gateway: Gateway, path: str, body: bytes) -> httpx.Response:
    return httpx.post(f"{gateway.url}{path}", content=body, timeout=60, verify=PLAIN)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _reset_peak(gateway: Gateway) -> int:
    """Resident bytes now, from which the peak counts on."""
    Path(f"/proc/{gateway.process.pid}/clear_refs").write_text("5")
    return _peak(gateway)


def _peak(gateway: Gateway) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


# --- anything at all ---

CLIENT = httpx.Client(timeout=30, verify=PLAIN)  # one, for making one takes longer than a request
JSONISH = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["tiny", "user", "text", "a" * 300]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    *("prompt", "messages", "n", "temperature", "top_p", "top_k", "seed", "stop", "logit_bias"),
    *("stop_token_ids", "logprobs", "top_logprobs", "echo", "best_of", "stream", "stream_options"),
    *("presence_penalty", "tools", "response_format", "max_completion_tokens", "user"),
]
BODIES = st.fixed_dictionaries(
    {"model": st.just("tiny") | JSONISH, "max_tokens": st.just(2) | JSONISH},
    optional=dict.fromkeys(FIELDS, JSONISH),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=BODIES | JSONISH, chat=st.booleans(), good=st.booleans())
def test_no_body_is_the_servers_fault(gateway: Gateway, body: Any, chat: bool, good: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    if good and isinstance(body, dict):
        body |= {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    answer = CLIENT.post(gateway.url + path, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=200))
def test_no_bytes_are_the_servers_fault(gateway: Gateway, content: bytes) -> None:
    answer = CLIENT.post(f"{gateway.url}/v1/completions", content=content)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
