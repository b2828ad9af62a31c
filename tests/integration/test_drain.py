"""A decode worker that is taken out of service and back, as an operator and clients see it."""

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import precast
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.gateway_stack import Gateway, Stack

MODEL = "tiny"
BODY = {"model": MODEL, "prompt": "the fox", "max_tokens": 8, "ignore_eos": True}


@dataclass(frozen=True, kw_only=True)
class Service:
    """A gateway over two real workers."""

    gateway: Gateway
    workers: tuple[DecodeWorker, DecodeWorker]
    redis_url: str

    def cli(self, *arguments: object) -> "subprocess.CompletedProcess[str]":
        """``precast workers ...``"""
        return precast("workers", *arguments, environment={"PRECAST_REDIS_URL": self.redis_url})

    def states(self) -> dict[str, str]:
        """Workers' states by address, as the command line lists them."""
        listed = self.cli("list", "--json")
        return {row["address"]: row["state"] for row in json.loads(listed.stdout)}

    def ask(self, **changes: Any) -> int:
        return self.gateway.post("/v1/completions", json={**BODY, **changes}).status_code

    def served_by(self, requests: int) -> list[int]:
        """Steps that each worker makes of some requests, all of which are answered."""
        before = [steps(worker) for worker in self.workers]
        with ThreadPoolExecutor(requests) as threads:
            assert {*threads.map(lambda _: self.ask(), range(requests))} == {200}
        return [steps(worker) - old for worker, old in zip(self.workers, before, strict=True)]


def steps(worker: DecodeWorker) -> int:
    status = worker.status()
    return int(status.graph_steps + status.eager_steps)


@pytest.fixture(scope="module")
def service(tiny_home: Path, tiny_redis: str) -> Iterator[Service]:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        with (
            decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1") as one,
            decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1") as two,
        ):
            gateway = stack.gateway(wait_for=2)
            yield Service(gateway=gateway, workers=(one, two), redis_url=tiny_redis)
    finally:
        for process in stack.started:
            process.kill()
            process.wait()


def test_a_drained_worker_gets_no_request_until_it_is_undrained(service: Service) -> None:
    one, two = service.workers
    assert all(service.served_by(6))
    running: list[int] = []
    thread = threading.Thread(target=lambda: running.append(service.ask(max_tokens=200, n=2)))
    thread.start()
    eventually(lambda: any(worker.status().running for worker in service.workers))
    busy = one if one.status().running else two
    idle = two if busy is one else one

    drained = service.cli("drain", busy.status().worker_id)
    thread.join()
    assert running == [200], "what runs is finished"
    assert "drained: " in drained.stdout, drained.stderr
    assert "0 aborted" in drained.stdout
    assert service.states() == {busy.address: "draining", idle.address: "ready"}
    eventually(lambda: service.gateway.workers() == 1)
    made = service.served_by(6)
    assert made[service.workers.index(busy)] == 0

    assert service.cli("drain", idle.address).returncode == 0
    eventually(lambda: service.gateway.get("/ready").status_code == 503)
    assert service.ask() == 503

    back = service.cli("undrain", busy.address)
    assert back.stdout == f"{busy.address}  in service\n"
    eventually(lambda: service.gateway.workers() == 1)
    assert service.served_by(2)[service.workers.index(idle)] == 0
    assert service.cli("undrain", idle.address).returncode == 0
    eventually(lambda: service.gateway.workers() == 2)
    assert all(service.served_by(6))
    assert "as it was before" in service.cli("undrain", idle.address).stdout


def test_a_worker_that_is_not_there_is_named(service: Service) -> None:
    failed = service.cli("drain", "decode-nobody")
    assert failed.returncode == 1
    assert "'decode-nobody'" in failed.stderr
    assert failed.stderr.count("\n") == 1
