"""A stack of containers out of ``deploy/docker-compose.yml``, under a project name of its own."""

import functools
import itertools
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx

from precast.proto.admin.v1 import admin_service_pb2_grpc
from precast.proto.decode.v1 import decode_service_pb2, decode_service_pb2_grpc
from precast.rpc.tls import NAME, Role, of_channel
from precast.rpc.tls_files import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Pem
from precast.system.process import available_cpus

ROOT = Path(__file__).parents[2]
FILES = ("deploy/docker-compose.yml", "deploy/docker-compose.test.yml")
MODEL = "smollm2-135m-instruct"
DECODE_WORKERS = ("decode-worker-1", "decode-worker-2")
SERVICES = ("redis", "compile-worker", *DECODE_WORKERS, "gateway")
"""That keep running."""
IMAGES = ("redis", *DECODE_WORKERS, "gateway", "credentials", "models", "compile-worker")
CREDENTIALS = "/var/lib/precast/credentials"
BUILD_DEADLINE_S = 1200
START_DEADLINE_S = 240


def wait_until(check: Callable[[], Any], deadline_s: float, what: str) -> Any:
    """The first truthy answer of ``check``; fails after the deadline with the last answer."""
    end = time.monotonic() + deadline_s
    while True:
        answer = check()
        if answer:
            return answer
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.25)


def _environment(batch_sizes: tuple[int, ...], bucket: int) -> dict[str, str]:
    cpus = available_cpus()
    half = max(1, len(cpus) // 2)
    stack = {
        "PRECAST_PORT": "0",
        "PRECAST_BATCH_SIZES": ",".join(map(str, batch_sizes)),
        "PRECAST_PREFILL_BUCKETS": str(bucket),
        "PRECAST_CPUS_1": ",".join(map(str, cpus[:half])),
        "PRECAST_CPUS_2": ",".join(map(str, cpus[-half:])),
    }
    inherited = {name: text for name, text in os.environ.items() if name[:8] != "PRECAST_"}
    return inherited | stack


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Runs ``docker compose`` for one project."""

    batch_sizes: tuple[int, ...]
    prefill_bucket: int
    project: str = field(default_factory=lambda: f"precast-test-{uuid.uuid4().hex[:8]}")

    def compose(self, *arguments: str, deadline_s: float = 60, check: bool = True) -> str:
        """Standard output of ``docker compose ARGUMENTS``; fails with its errors."""
        files = [part for file in FILES for part in ("-f", file)]
        done = subprocess.run(
            ["docker", "compose", "-p", self.project, *files, *arguments],
            cwd=ROOT,
            env=_environment(self.batch_sizes, self.prefill_bucket),
            capture_output=True,
            text=True,
            timeout=deadline_s,
        )
        if check and done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-60:])
            raise AssertionError(f"docker compose {' '.join(arguments)}:\n{tail}")
        return done.stdout.strip()

    def build(self) -> None:
        """Build every image. One after the other: they share their first stages."""
        for image in IMAGES:
            self.compose("build", "-q", image, deadline_s=BUILD_DEADLINE_S)

    def up(self) -> None:
        """Start everything and wait until it is healthy; fails with the services' logs."""
        wait = ("--wait", "--wait-timeout", str(START_DEADLINE_S))
        try:
            # models and credentials start as dependencies: named here, --wait would take their
            # end for a failure
            self.compose("up", "-d", *wait, *SERVICES, deadline_s=START_DEADLINE_S + 60)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.compose('logs', '--tail=40')}") from None

    def down(self) -> None:
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "20", deadline_s=120)

    def leftovers(self) -> list[str]:
        """Containers, volumes and networks of this project that exist."""
        label = f"label=com.docker.compose.project={self.project}"
        listings = (("ps", "-aq"), ("volume", "ls", "-q"), ("network", "ls", "-q"))
        found = (docker(*listing, "--filter", label).split() for listing in listings)
        return list(itertools.chain.from_iterable(found))

    def shell(self, service: str, script: str, *, check: bool = True) -> str:
        """Output of a shell script in a running container."""
        return self.compose("exec", "-T", service, "sh", "-c", script, check=check)

    def kill_main_process(self, service: str) -> None:
        """SIGKILL for the service's own process: the engine sees a crash and restarts it."""
        self.shell(service, "kill -9 $(cat /proc/1/task/1/children)", check=False)

    def address(self, service: str, port: int) -> str:
        """Where the host reaches a container's port. It changes when the container restarts."""
        return self.compose("port", service, str(port))

    def run(self, service: str, *command: str, entrypoint: str | None = None) -> str:
        """Output of a command in a container of its own."""
        entry = () if entrypoint is None else ("--entrypoint", entrypoint)
        return self.compose("run", "--rm", "-T", "--no-deps", *entry, service, *command)

    @functools.cached_property
    def api_key(self) -> str:
        """Of the first start."""
        return self.run("credentials", "api-key")

    @functools.cached_property
    def admin_tls(self) -> Pem:
        names = [f"{CREDENTIALS}/{Role.ADMIN}/{name}" for name in _TLS_FILES]
        return _tls(self.run("admin", *names, entrypoint="cat"))

    def tls(self, service: str, role: Role) -> Pem:
        """What a running service shows."""
        names = " ".join(f"{CREDENTIALS}/{role}/{name}" for name in _TLS_FILES)
        return _tls(self.shell(service, f"cat {names}"))

    def channel(self, service: str, port: int, tls: Pem) -> grpc.Channel:
        options = [("grpc.ssl_target_name_override", NAME)]
        return grpc.secure_channel(self.address(service, port), of_channel(tls), options)

    def post(self, path: str, body: dict[str, Any], key: str | None = None) -> httpx.Response:
        """With the API key of the first start, or another one; "": with none."""
        key = self.api_key if key is None else key
        return httpx.post(
            f"http://{self.address('gateway', 8000)}{path}",
            json=body,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=60,
        )

    def complete(
        self, max_tokens: int = 16, key: str | None = None, **fields: object
    ) -> httpx.Response:
        body = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
        return self.post("/v1/completions", body | {"max_tokens": max_tokens} | fields, key)

    def status(self, worker: str) -> decode_service_pb2.GetStatusResponse:
        """A decode worker's own account of itself; ``grpc.RpcError`` if it can't be reached."""
        with self.channel(worker, 7200, self.admin_tls) as channel:
            stub = decode_service_pb2_grpc.DecodeServiceStub(channel)
            return stub.GetStatus(decode_service_pb2.GetStatusRequest(), timeout=5)

    def graphs(self, worker: str) -> dict[int, tuple[int, ...]]:
        """Versions of each batch size's graph; empty while the worker can't be reached."""
        try:
            loaded = self.status(worker).graphs
        except (grpc.RpcError, AssertionError):
            return {}
        return {graph.num_tokens: tuple(graph.versions) for graph in loaded}

    def has_all_graphs(self, worker: str) -> bool:
        return sorted(self.graphs(worker)) == [*self.batch_sizes, self.prefill_bucket]

    def admin(self) -> tuple[grpc.Channel, admin_service_pb2_grpc.AdminServiceStub]:
        channel = self.channel("compile-worker", 7100, self.admin_tls)
        return channel, admin_service_pb2_grpc.AdminServiceStub(channel)


_TLS_FILES = (CA_FILE, CERTIFICATE_FILE, KEY_FILE)


def _tls(pem: str) -> Pem:
    """Out of the three files, one after the other."""
    block = re.compile(r"-----BEGIN [^-]+-----.+?-----END [^-]+-----\n?", re.DOTALL)
    authority, certificate, key = (found.encode() for found in block.findall(pem))
    return Pem(authority=authority, certificate=certificate, key=key)


def docker(*arguments: str) -> str:
    """What a command of Docker's says, which must not fail."""
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def code_of(channel: grpc.Channel, method: str) -> grpc.StatusCode:
    """How a call ends that asks for nothing."""
    untyped: Any = channel
    try:
        untyped.unary_unary(f"/precast.{method}")(b"", timeout=5)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def warnings_in(logs: str) -> str:
    """The last lines of services' logs that are more than routine."""
    telling = ("warning", "error", "failed", "Traceback")
    return "\n".join([line for line in logs.splitlines() if any(w in line for w in telling)][-20:])


def engine_missing() -> str | None:
    """Why containers can't be run here, in one line, or None."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{' '.join(command)}: {error}"
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}"
    return None


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a server-sent stream that must end in ``[DONE]``."""
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data and data[-1] == "[DONE]", response.text[-500:]
    return [json.loads(item) for item in data[:-1]]
