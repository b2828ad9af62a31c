"""The processes of the chaos test (``chaos.py``), which are killed and started again.

Two compile workers over one store, three decode workers with simulated ranks and a cache each, a
gateway, and a Redis that may lose everything. Captures are those of ``capture_program.py``; a
decode worker that is started again may want graphs of a further set.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from precast.config.settings import DecodeWorkerSettings, load_settings
from precast.proto.decode.v1 import decode_service_pb2 as decode_pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.proto.graphs.v1.graphs_service_pb2_grpc import GraphsServiceStub
from precast.system.redis_server import start_redis
from services.decode_worker.engine.sizing import shares
from services.decode_worker.main import run
from services.decode_worker.ranks.launcher import RankLauncher
from tests.support import compile_worker, forked
from tests.support.capture import BUILD_DIR
from tests.support.chaos_rank import set_factors
from tests.support.compile_worker import program, starts, wait_until
from tests.support.gateway_stack import Gateway, Stack
from tests.support.leases import publish_asker
from tests.support.models import write_model
from tests.support.ports import free_port

MODEL = "tiny"
SIZES = (1, 2, 3, 4)
KILLS_PER_SET = 5
"""Decode workers that start after as many kills want graphs of the next set."""
CAPTURE_S = 0.5
STEP_MS = 5
TOKENS = 24
PAUSE_S = 0.6
"""Longest wait for a kill once a capture has begun: a little longer than a capture takes."""
IDLE_S = 1.0
"""Longest wait for a capture to begin."""
WEIGHTS = {"redis": 1.0, "compile": 1.0, "decode": 0.7}
REVIVED = 0.8
"""How likely a dead process is started again at each kill."""
EMPTIED = 0.3
"""How likely a Redis starts again with nothing in it."""
CALM_S = 120.0


@dataclass(kw_only=True)
class Part:
    """One process that is killed and started again."""

    kind: str
    start: Callable[[], forked.Process]
    process: forked.Process

    def kill(self) -> None:
        assert self.process.poll() is None, f"{self.kind} has ended by itself"
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def serve_decode_worker(arguments: Sequence[str]) -> int:
    """A decode worker of simulated ranks, with settings as JSON."""
    settings = load_settings(DecodeWorkerSettings, **json.loads(arguments[0]))
    return run(settings, RankLauncher("tests.support.chaos_rank"), shares(settings)[0])


@dataclass(kw_only=True)
class Chaos:
    """The stack under test, and the dice."""

    home: Path
    seed: int
    random: random.Random
    redis_url: str
    compile_addresses: tuple[str, str]
    decode_addresses: tuple[str, str, str]
    front: Stack
    parts: list[Part] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    started: int = 0

    @property
    def ledger(self) -> Path:
        return self.home / "ledger"

    @property
    def sets(self) -> int:
        """How many sets of graphs were wanted so far."""
        return 1 + self.kills.total() // KILLS_PER_SET

    def logs(self, kind: str) -> str:
        """What all processes of a kind have logged."""
        return "".join(path.read_text() for path in sorted(self.home.glob(f"{kind}-*.log")))

    def launch(self) -> None:
        """Start everything; the first compile worker makes the key that signs."""
        write_model(self.home / "models" / MODEL)
        program(self.ledger)
        (self.ledger / "pace").write_text(str(CAPTURE_S))
        self.add("redis", self.start_redis)
        for address in self.compile_addresses:
            self.add("compile", lambda address=address: self.start_compile_worker(address))
            wait_until(lambda address=address: _reachable(address), CALM_S)
        for address in self.decode_addresses:
            self.add("decode", lambda address=address: self.start_decode_worker(address))
            wait_until(lambda address=address: _reachable(address), CALM_S)

    def add(self, kind: str, start: Callable[[], forked.Process]) -> None:
        self.parts.append(Part(kind=kind, start=start, process=start()))

    def start_redis(self) -> forked.Process:
        folder = self.home / "redis"
        if self.kills and self.random.random() < EMPTIED:
            for path in folder.glob("dump.rdb"):
                path.unlink()
        return start_redis(folder, int(self.redis_url.rpartition(":")[2].partition("/")[0])).process

    def start_compile_worker(self, address: str) -> forked.Process:
        given = self.common(address) | {"build_dir": str(BUILD_DIR), "parallel_captures": 2}
        given["capture_idle"] = False
        return self.spawn("compile", [compile_worker.PROGRAM, json.dumps(given), str(self.ledger)])

    def start_decode_worker(self, address: str) -> forked.Process:
        cache = self.home / f"cache-{address.rpartition(':')[2]}"
        given = self.common(address) | {"model": MODEL, "cache_dir": str(cache)}
        given |= {"batch_sizes": ",".join(map(str, SIZES)), "max_batch_size": max(SIZES)}
        given |= {"prefill_buckets": "", "adapt_graphs": False}
        environment = {"CHAOS_SET": str(self.sets - 1), "PRECAST_SIMULATED_STEP_MS": str(STEP_MS)}
        return self.spawn(
            "decode", [f"{__name__}:serve_decode_worker", json.dumps(given)], environment
        )

    def common(self, address: str) -> dict[str, Any]:
        return {"home": str(self.home), "redis_url": self.redis_url, "listen": address}

    def spawn(
        self, kind: str, command: Sequence[str], environment: dict[str, str] | None = None
    ) -> forked.Process:
        self.started += 1
        with (self.home / f"{kind}-{self.started:03}.log").open("wb") as log:
            return forked.start(
                command[0],
                command[1:],
                stdout=log,
                stderr=log,
                environment={**os.environ, "PRECAST_LOG_FORMAT": "json", **(environment or {})},
            )

    def gateway(self) -> Gateway:
        """Sees all decode workers; it is not killed."""
        return self.front.gateway(wait_for=len(self.decode_addresses))

    def kill_one(self) -> None:
        """Start some of the dead again and kill one of the living, often amid a capture."""
        self.revive(REVIVED)
        begun, end = len(starts(self.ledger)), time.monotonic() + IDLE_S
        while len(starts(self.ledger)) == begun and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(self.random.uniform(0, PAUSE_S))
        alive = [part for part in self.parts if part.process.returncode is None]
        victim = self.random.choices(alive, [WEIGHTS[part.kind] for part in alive])[0]
        victim.kill()
        self.kills[victim.kind] += 1
        self.request(timeout_s=0.3)  # in the way of decode workers that are started and killed

    def revive(self, share: float) -> None:
        for part in self.parts:
            if part.process.returncode is not None and self.random.random() < share:
                part.process = part.start()

    def request(self, timeout_s: float = 2.0) -> list[pb.GraphState]:
        """Ask one of the compile workers for every set; none if it doesn't answer."""
        specs = [
            pb.GraphSpec(factors={**set_factors(number), "num_tokens": str(size)})
            for number in range(self.sets)
            for size in SIZES
        ]
        asking = publish_asker(self.redis_url, [spec.factors for spec in specs])
        request = pb.RequestGraphsRequest(specs=specs, worker_id=asyncio.run(asking))
        with grpc.insecure_channel(self.random.choice(self.compile_addresses)) as channel:
            stub: Any = GraphsServiceStub(channel)  # type: ignore[no-untyped-call]
            try:
                answer = stub.RequestGraphs(request, timeout=timeout_s)
            except grpc.RpcError:
                return []
            return list(answer.states)

    def complete(self) -> list[str]:
        """Ask for every set until all graphs are published; their keys."""

        def published() -> list[str]:
            states = self.request()
            done = all(state.phase == pb.GRAPH_PHASE_PUBLISHED for state in states)
            return [state.key for state in states] if done else []

        keys: list[str] = wait_until(published, CALM_S)
        return keys

    def settled(self) -> bool:
        """Whether every decode worker is there and has all of its graphs."""
        return all(map(_has_graphs, self.decode_addresses))

    def stop(self) -> None:
        for process in (*self.front.started, *(part.process for part in self.parts)):
            process.kill()
            process.wait()


def _reachable(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            return False
        return True


def _has_graphs(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        stub: Any = DecodeServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            status = stub.GetStatus(decode_pb.GetStatusRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return bool(status.state == decode_pb.WORKER_STATE_READY and len(status.graphs) == len(SIZES))


@contextmanager
def chaos(home: Path, seed: int) -> Iterator[Chaos]:
    """The stack, running; gone afterwards."""
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(6)]
    url = f"redis://{addresses[0]}/0"
    stack = Chaos(
        home=home,
        seed=seed,
        random=random.Random(seed),
        redis_url=url,
        compile_addresses=(addresses[1], addresses[2]),
        decode_addresses=(addresses[3], addresses[4], addresses[5]),
        front=Stack(redis_url=url, models_dir=home / "models", started=[]),
    )
    try:
        stack.launch()
        yield stack
    finally:
        stack.stop()
