"""The containers of ``deploy/``, built, used, broken and taken down: ``make compose-test``.

Needs nothing but a ``docker compose`` that works. The tests run in order on one stack.
"""

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import grpc
import httpx
import pytest
from compose_stack import (
    CREDENTIALS,
    DECODE_WORKERS,
    MODEL,
    SERVICES,
    Stack,
    code_of,
    docker,
    engine_missing,
    events,
    wait_until,
    warnings_in,
)

from precast.proto.admin.v1 import admin_service_pb2 as admin
from precast.rpc.tls import Role
from precast.rpc.tls_files import KEY_FILE

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("PRECAST_COMPOSE_TEST") != "1",
        reason="builds and runs containers; make compose-test runs it",
    ),
    pytest.mark.timeout(1800),
]
CAPTURE_DEADLINE_S = 420
COMPILERS = "cc c++ gcc g++ cpp clang clang++ ld as make"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    missing = engine_missing()
    if missing:
        pytest.fail(f"no Docker engine with Compose: {missing}", pytrace=False)
    stack = Stack(batch_sizes=(1, 2), prefill_bucket=16)
    try:
        stack.build()
        stack.up()
        yield stack
    finally:
        stack.down()


@dataclass
class Load:
    """Completions that follow each other until stopped, several at once."""

    stack: Stack
    streams: int = 2
    answers: list[httpx.Response] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._run) for _ in range(self.streams)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.answers.append(self.stack.complete(32))
            except httpx.HTTPError as error:
                self.failures.append(repr(error))

    def good(self) -> int:
        return sum(answer.status_code == 200 for answer in self.answers)


def test_it_completes_before_the_graphs_are_there(stack: Stack) -> None:
    answer = stack.complete()
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["choices"][0]["text"].strip()
    assert body["usage"]["completion_tokens"] == 16


def test_chat_streams(stack: Stack) -> None:
    answer = stack.post(
        "/v1/chat/completions",
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Say hello."}],
            "max_tokens": 8,
            "stream": True,
        },
    )
    assert answer.status_code == 200, answer.text
    deltas = [event["choices"][0]["delta"] for event in events(answer) if event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas)


def test_no_service_runs_as_root(stack: Stack) -> None:
    for service in SERVICES:
        assert stack.shell(service, "id -u") != "0"


def test_http_is_closed_without_an_api_key(stack: Stack) -> None:
    """The first start makes one. Its log says how to see it, and does not show it."""
    log = stack.compose("logs", "credentials")
    assert "credentials api-key" in log and stack.api_key not in log
    assert stack.complete(1).status_code == 200
    wrong = stack.api_key[:-1] + ("a" if stack.api_key[-1] != "a" else "b")
    for key in ("", wrong):
        refused = stack.complete(1, key=key)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_redis_is_closed_without_its_password(stack: Stack) -> None:
    ping = "python -m precast.rpc.healthcheck redis://redis:6379/0"
    assert stack.shell("gateway", f"{ping} && echo open") == "open"
    bare = f"PRECAST_REDIS_PASSWORD_FILE= {ping} 2>/dev/null || echo closed"
    assert stack.shell("gateway", bare) == "closed"
    assert "NOAUTH" in stack.shell("redis", "redis-cli keys '*'", check=False)


DECODE, COMPILE = ("decode-worker-1", 7200), ("compile-worker", 7100)
DOORS = [
    (DECODE, "decode.v1.DecodeService/GetStatus", {Role.GATEWAY, Role.ADMIN}),
    (DECODE, "decode.v1.DecodeService/Undrain", {Role.ADMIN}),
    (COMPILE, "graphs.v1.GraphsService/ListGraphs", {Role.DECODE_WORKER, Role.ADMIN}),
    (COMPILE, "admin.v1.AdminService/ListJobs", {Role.ADMIN}),
]


@pytest.mark.parametrize(("where", "method", "roles"), DOORS)
def test_grpc_is_open_to_its_roles_alone(
    stack: Stack, where: tuple[str, int], method: str, roles: set[Role]
) -> None:
    certificates = {
        Role.GATEWAY: stack.tls("gateway", Role.GATEWAY),
        Role.DECODE_WORKER: stack.tls("decode-worker-2", Role.DECODE_WORKER),
        Role.ADMIN: stack.admin_tls,
    }
    found = {}
    for role, tls in certificates.items():
        with stack.channel(*where, tls) as channel:
            found[role] = code_of(channel, method)
    closed = {role for role, code in found.items() if code is grpc.StatusCode.PERMISSION_DENIED}
    assert set(certificates) - closed == roles, found
    assert grpc.StatusCode.UNAVAILABLE not in found.values()
    with grpc.insecure_channel(stack.address(*where)) as channel:
        assert code_of(channel, method) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("service", "role"),
    [("gateway", Role.GATEWAY), *((name, Role.DECODE_WORKER) for name in DECODE_WORKERS)],
)
def test_each_service_has_its_own_secrets_alone(stack: Stack, service: str, role: Role) -> None:
    assert stack.shell(service, f"find {CREDENTIALS} -name '*.key'") == (
        f"{CREDENTIALS}/{role}/{KEY_FILE}"
    )
    assert stack.shell(service, f"find {CREDENTIALS} -type f -perm /077") == ""
    refused = stack.shell(service, f"touch {CREDENTIALS}/own 2>/dev/null || echo refused")
    assert refused == "refused"


@pytest.mark.parametrize("image", ["gateway", "credentials", "decode-worker", "compile-worker"])
def test_no_image_has_secrets(stack: Stack, image: str) -> None:
    find = ("run", "--rm", "--entrypoint", "find", f"precast/{image}")
    assert docker(*find, "/var/lib/precast", "-type", "f", "-not", "-name", ".*") == ""


def test_a_second_start_changes_no_credentials(stack: Stack) -> None:
    assert stack.run("credentials") == ""
    assert stack.complete(1).status_code == 200


def test_commands_show_the_admins_certificate(stack: Stack) -> None:
    listed = json.loads(stack.run("admin", "workers", "list", "--json"))
    assert sorted(lease["address"] for lease in listed) == [
        f"{name}:7200" for name in DECODE_WORKERS
    ]
    assert isinstance(json.loads(stack.run("admin", "graphs", "list", "--json")), list)


def test_only_the_compile_worker_has_a_compiler(stack: Stack) -> None:
    on_path = f"for name in {COMPILERS}; do command -v $name; done; true"
    assert "g++" in stack.shell("compile-worker", on_path)
    anywhere = (
        "find / -xdev -type f \\( -name 'cc1*' -o -name '*g++*' -o -name 'clang*' \\) -perm -1"
    )
    assert "cc1plus" in stack.shell("compile-worker", f"{anywhere} 2>/dev/null; true")
    for service in (*DECODE_WORKERS, "gateway"):
        assert stack.shell(service, on_path) == ""
        assert stack.shell(service, f"{anywhere} 2>/dev/null; true") == ""


def test_the_signing_key_stays_with_the_compile_worker(stack: Stack) -> None:
    key = "test -s /var/lib/precast/signing/signing.key && echo there; true"
    assert stack.shell("compile-worker", key) == "there"
    for worker in DECODE_WORKERS:
        assert stack.shell(worker, key) == ""
        assert stack.shell(worker, "find /var/lib/precast -name 'signing*key'") == ""
        refused = stack.shell(worker, "touch /var/lib/precast/keys/trusted/own.pub || echo refused")
        assert refused == "refused"


def test_workers_replay_captured_graphs(stack: Stack) -> None:
    for worker in DECODE_WORKERS:
        try:
            check = partial(stack.has_all_graphs, worker)
            wait_until(check, CAPTURE_DEADLINE_S, f"{worker} has its graphs")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{warnings_in(stack.compose('logs'))}") from None
    before = {worker: stack.status(worker) for worker in DECODE_WORKERS}
    assert stack.complete(32, ignore_eos=True).status_code == 200
    after = {worker: stack.status(worker) for worker in DECODE_WORKERS}
    replayed = sum(after[name].graph_steps - before[name].graph_steps for name in after)
    eager = sum(after[name].eager_steps - before[name].eager_steps for name in after)
    assert replayed >= 16
    assert eager == 0


def test_recompiling_swaps_a_new_version_in_while_serving(stack: Stack) -> None:
    before = {worker: stack.graphs(worker)[1] for worker in DECODE_WORKERS}
    channel, stub = stack.admin()
    request = admin.RecompileRequest(sizes=[1], adoption_deadline_s=120)
    with channel, Load(stack) as load:
        progress = list(stub.Recompile(request, timeout=CAPTURE_DEADLINE_S))
        wait_until(lambda: load.good() >= 4, 60, "requests went on")
    assert not load.failures
    assert {answer.status_code for answer in load.answers} == {200}
    last = progress[-1]
    assert last.stage == admin.RECOMPILE_STAGE_ADOPTED, progress
    assert (last.adopted, last.workers) == (2, 2)
    for worker in DECODE_WORKERS:
        after = stack.graphs(worker)[1]
        assert all(new > old for new, old in zip(after, before[worker], strict=True))
        assert after == (last.version,)
    assert stack.complete().status_code == 200


def test_a_killed_worker_comes_back_out_of_its_cache(stack: Stack) -> None:
    """With no compile worker alive; meanwhile the other worker serves and no request hangs."""
    stack.compose("stop", "compile-worker")
    first = stack.status("decode-worker-1").worker_id
    with Load(stack) as load:
        wait_until(lambda: load.good() >= 2, 60, "requests run")
        stack.kill_main_process("decode-worker-1")
        served = load.good()
        wait_until(lambda: load.good() >= served + 4, 60, "the other worker serves")
        wait_until(lambda: stack.has_all_graphs("decode-worker-1"), 90, "the killed worker is back")
    assert not load.failures
    for answer in load.answers:
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert error["message"] and error["type"]
    assert stack.status("decode-worker-1").worker_id != first
    stack.compose("start", "compile-worker")


def test_nothing_is_left_after_down(stack: Stack) -> None:
    assert stack.leftovers()
    stack.down()
    assert stack.leftovers() == []
