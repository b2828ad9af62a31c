"""Real compile workers in processes of their own, for tests; captures are those of a small program.

``python -m tests.support.compile_worker SETTINGS_JSON LEDGER`` is one worker; with an empty LEDGER
its captures are real, and forks of a process that all workers of a test run share.
"""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from precast.config.settings import CompileWorkerSettings, load_settings
from precast.fleet.queue.asks import ASK_TTL_S
from precast.proto.admin.v1 import admin_service_pb2_grpc as admin_grpc
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2_grpc as graphs_grpc
from precast.rpc.server import open_channel
from services.compile_worker.main import CaptureProgram, capture_program, run
from tests.support import capture_forks, forked
from tests.support.capture import BUILD_DIR
from tests.support.leases import publish_asker
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
PROGRAM = "tests.support.compile_worker:main"
CAPTURES = "CAPTURE_FORKS"
BUILD = {"compiler": "test 1.0", "flags": "-O2"}
FACTORS = {
    "architecture": "llama",
    "hidden_size": "576",
    "query_groups": "3,3,3",
    "head_dim": "64",
    "intermediate_size": "1536",
    "vocab_size": "49152",
    "vocab_widths": "49152",
    "rms_norm_eps": "1e-05",
    "options": "{}",
    "tp_size": "1",
    "weight_dtype": "fp32",
    "quantization": "int8",
    "head_quantization": "int8",
    "packing_version": "1",
    "num_tokens": "1",
    "block_size": "32",
    "kv_dtype": "fp32",
    "provider": "native",
    "provider_abi": "1",
    "torch": "2.13.0+cpu",
    "isa": "x86-64-v3",
    "graph_source": "0123456789abcdef",
}
"""Well-formed factors; tests change some of them."""


@dataclass(frozen=True, kw_only=True)
class WorkerProcess:
    """A running compile worker."""

    process: forked.Process
    address: str
    home: Path
    log: Path
    redis_url: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def program(ledger: Path) -> CaptureProgram:
    """The test's capture program, which notes its starts in a folder."""
    ledger.mkdir(parents=True, exist_ok=True)
    return CaptureProgram(
        module="tests.support.capture_program",
        arguments=(str(ledger),),
        build_factors=lambda: BUILD,
    )


def forked_captures(settings: CompileWorkerSettings) -> CaptureProgram:
    """The real ones."""
    given = capture_program(settings).arguments
    arguments = (os.environ[CAPTURES], *given)
    return CaptureProgram(module=capture_forks.__name__, arguments=arguments)


def starts(ledger: Path) -> list[list[str]]:
    """[pid, architecture, batch size] of each capture begun."""
    path = ledger / "started"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def has_captures(home: Path) -> bool:
    """Whether a capture has its folder: a moment longer than until its graph is published."""
    return any((home / "captures").iterdir())


@contextmanager
def compile_worker(
    home: Path, redis_url: str, ledger: Path | None = None, **settings: Any
) -> Iterator[WorkerProcess]:
    """A worker that answers; killed at the end if it still lives.

    With a ledger its captures are those of the test's program, else real ones.
    """
    address = f"127.0.0.1:{free_port()}"
    given = {"home": str(home), "redis_url": redis_url, "listen": address}
    given |= {"build_dir": str(BUILD_DIR), "capture_idle": False, **settings}
    home.mkdir(parents=True, exist_ok=True)
    log = home / f"worker-{time.time_ns()}.log"
    with log.open("wb") as file:
        process = forked.start(
            PROGRAM,
            [json.dumps(given), str(ledger or "")],
            stdout=file,
            stderr=file,
            environment={
                **os.environ,
                "PRECAST_LOG_FORMAT": "json",
                CAPTURES: str(capture_forks.path()) if ledger is None else "",
            },
        )
    worker = WorkerProcess(
        process=process, address=address, home=home, log=log, redis_url=redis_url
    )
    try:
        _wait_until_serving(worker)
        yield worker
    finally:
        process.kill()
        process.wait()


def _wait_until_serving(worker: WorkerProcess, deadline_s: float = 60.0) -> None:
    def serving() -> bool:
        assert worker.process.poll() is None, worker.log.read_text()
        with grpc.insecure_channel(worker.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            try:
                stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
            except grpc.RpcError:
                return False
            return True

    wait_until(serving, deadline_s)


def wait_until(condition: Callable[[], Any], deadline_s: float = 60.0) -> Any:
    """Poll until the condition holds, and return what it gave."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.03)
    raise AssertionError(f"did not come true within {deadline_s:g} s")


_ASK_S: Final = ASK_TTL_S / 3


@dataclass(frozen=True, kw_only=True)
class Client:
    """Stubs to one worker."""

    graphs: graphs_grpc.GraphsServiceStub
    admin: admin_grpc.AdminServiceStub
    redis_url: str
    _asked: list[pb.RequestGraphsRequest] = field(default_factory=list, init=False)

    async def request(
        self, *specs: dict[str, str], model: str = "tiny", urgencies: Sequence[int] = ()
    ) -> list[pb.GraphState]:
        """Ask for graphs as a decode worker that wants just these."""
        worker_id = await publish_asker(self.redis_url, specs)
        message = pb.RequestGraphsRequest(
            specs=[
                pb.GraphSpec(factors=spec, urgency=urgency)
                for spec, urgency in zip_longest(specs, urgencies, fillvalue=0)
            ],
            model=model,
            worker_id=worker_id,
        )
        self._asked.append(message)
        return list((await self.graphs.RequestGraphs(message, timeout=30)).states)

    async def until(
        self, keys: list[str], *phases: int, deadline_s: float = 60.0
    ) -> dict[str, pb.GraphState]:
        """Watch the keys until each is in one of the phases."""
        asking = asyncio.create_task(self._ask_again())
        try:
            return await self._watch(keys, phases, deadline_s)
        finally:
            asking.cancel()

    async def _ask_again(self) -> None:
        """As decode workers do it: what nobody has asked for within a minute is not captured."""
        while True:
            await asyncio.sleep(_ASK_S)
            for message in self._asked:
                await self.graphs.RequestGraphs(message, timeout=30)

    async def _watch(
        self, keys: Sequence[str], phases: Sequence[int], deadline_s: float
    ) -> dict[str, pb.GraphState]:
        states: dict[str, pb.GraphState] = {}
        watch = self.graphs.WatchGraphs(pb.WatchGraphsRequest(keys=keys), timeout=deadline_s)
        async for message in watch:
            states[message.state.key] = message.state
            if len(states) == len(set(keys)) and all(s.phase in phases for s in states.values()):
                watch.cancel()
                break
        return states


@asynccontextmanager
async def connect(worker: WorkerProcess) -> AsyncIterator[Client]:
    channel = open_channel(worker.address)
    try:
        yield Client(
            graphs=graphs_grpc.GraphsServiceStub(channel),
            admin=admin_grpc.AdminServiceStub(channel),
            redis_url=worker.redis_url,
        )
    finally:
        await channel.close()


def main(arguments: Sequence[str]) -> int:
    options, ledger = arguments
    settings = load_settings(CompileWorkerSettings, **json.loads(options))
    captures = program(Path(ledger)) if ledger else None
    return run(settings, forked_captures(settings) if os.environ.get(CAPTURES) else captures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
