"""Decode workers that start at once on a warm store, against one alone.

    python -m bench.start_together [--workers 8] [--rounds 3] [--simulated]

One compile worker has ten graphs; the decode workers' caches are empty, so that each fetches all
of them, and each is ready once it has loaded them. Ranks are real, with SmolLM2-135M. Prints

* *start*: process start to readiness of one worker, and of the last of several, on this machine's
  cores: started one by one, and as replicas of one start (``--replicas``).
* *processor*: what all of it takes. So many starts can't be quicker than that over the cores.

With --simulated, ranks only answer, and further

* *fetch*: what workers share whatever cores they have: the compile worker's answers. A client takes
  the whole set (ask, stream, verify, keep), alone and several at once.
* *own cores*: the start of the last one if each worker had a machine of its own: one start, and
  what fetching together takes longer than fetching alone.
"""

import argparse
import asyncio
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from precast.graphs.artifacts.cache import GraphCache
from precast.graphs.artifacts.fetch import fetch_graph
from precast.graphs.artifacts.signing import TrustedKeys
from precast.models.importing.importer import import_model
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.graphs.v1 import graphs_service_pb2 as graphs_pb
from precast.system.redis_server import free_port, start_redis
from tests.support.compile_worker import FACTORS, ROOT, WorkerProcess, compile_worker, connect
from tests.support.decode_worker import DecodeWorker, eventually
from tests.support.models import write_model

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 64, 256)
"""What a worker wants unless it is told otherwise."""
GRAPH_BYTES = 1_250_000
"""As large as a graph of SmolLM2-135M."""
REAL_MODEL = "smollm2-135m-instruct"
READY_S = 180.0
SIMULATED = (
    "import sys; from precast.config.settings import DecodeWorkerSettings, load_settings;"
    "from services.decode_worker.ranks.launcher import RankLauncher;"
    "launcher = RankLauncher('bench.start_rank');"
    "from services.decode_worker.engine.sizing import shares;"
    "from services.decode_worker.main import run;"
    "settings = load_settings(DecodeWorkerSettings);"
    "sys.exit(run(settings, launcher, shares(settings)[0]))"
)


@dataclass(frozen=True, kw_only=True)
class Way:
    """How workers are started."""

    name: str
    starts: int = 1
    replicas: int = 1


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Where workers find everything."""

    home: Path
    redis_url: str
    compiler: WorkerProcess
    real: bool

    @property
    def model(self) -> str:
        return REAL_MODEL if self.real else "tiny"


@dataclass(frozen=True, kw_only=True)
class Start:
    """Of some workers at once."""

    wall_s: float
    """Until the last one was ready."""
    processor_s: float
    """Of all of them, ranks included."""
    compiler_s: float
    """Processor time of the compile worker meanwhile."""


@contextmanager
def launched(fleet: Fleet, replicas: int = 1) -> Iterator[list[DecodeWorker]]:
    """Workers with empty caches, just started."""
    port = free_port()  # those behind it are as good as free
    scratch = fleet.home / f"worker-{secrets.token_hex(4)}"
    given: dict[str, Any] = {"home": str(fleet.home), "redis_url": fleet.redis_url}
    given |= {"listen": f"127.0.0.1:{port}", "model": fleet.model, "cache_dir": str(scratch)}
    given |= {"wait_for_graphs": "true", "adapt_graphs": "false", "replicas": str(replicas)}
    command = [sys.executable, "-m", "precast", "decode-worker"]
    if not fleet.real:
        command = [sys.executable, "-c", SIMULATED]
    else:
        given |= {"quantization": "int8", "max_context_length": "512"}
    environment = {f"PRECAST_{name.upper()}": value for name, value in given.items()}
    log = scratch.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=file, env={**os.environ, **environment}
        )
    try:
        addresses = [f"127.0.0.1:{port + n}" for n in range(replicas)]
        yield [
            DecodeWorker(process=process, address=address, log=log, model=fleet.model)
            for address in addresses
        ]
    finally:
        process.kill()
        process.wait()


def start(fleet: Fleet, way: Way) -> Start:
    """Start workers in this way and wait for all."""
    before, begun = processor_s(fleet.compiler.process.pid), time.perf_counter()
    with ExitStack() as stack:
        starts = [stack.enter_context(launched(fleet, way.replicas)) for _ in range(way.starts)]
        for worker in (worker for workers in starts for worker in workers):
            eventually(worker.is_ready, READY_S)
        wall_s = time.perf_counter() - begun
        for worker in (worker for workers in starts for worker in workers):
            status = worker.stub().GetStatus(pb.GetStatusRequest(), timeout=5)
            assert len(status.graphs) == len(SIZES)
        return Start(
            wall_s=wall_s,
            processor_s=sum(processor_s(workers[0].process.pid) for workers in starts),
            compiler_s=processor_s(fleet.compiler.process.pid) - before,
        )


def processor_s(pid: int) -> float:
    """Of a process and its children so far."""
    root = psutil.Process(pid)
    times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


async def fetch(fleet: Fleet, clients: int) -> float:
    """Seconds until each of some clients has the whole set in an empty cache of its own.

    They share one process, so this is no less than what the compile worker takes.
    """
    trusted = TrustedKeys.load(fleet.compiler.home / "keys" / "trusted")
    specs = [{**FACTORS, "num_tokens": str(size)} for size in SIZES]

    async def take_all(folder: Path) -> None:
        cache = GraphCache(folder, trusted)
        async with connect(fleet.compiler) as client:
            states = await client.request(*specs)
            for spec, state in zip(specs, states, strict=True):
                await fetch_graph(client.graphs, cache, state.key, spec=spec)

    with tempfile.TemporaryDirectory(dir=fleet.home) as scratch:
        begun = time.perf_counter()
        await asyncio.gather(*(take_all(Path(scratch) / str(n)) for n in range(clients)))
        return time.perf_counter() - begun


async def capture_all(fleet: Fleet) -> None:
    """Fill the store with the graphs of ``FACTORS``."""
    async with connect(fleet.compiler) as client:
        states = await client.request(*({**FACTORS, "num_tokens": str(size)} for size in SIZES))
        await client.until([s.key for s in states], graphs_pb.GRAPH_PHASE_PUBLISHED, deadline_s=60)


@contextmanager
def warm_fleet(real: bool) -> Iterator[Fleet]:
    """A compile worker whose store has every graph that the workers want."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="precast-start-")))
        ledger = home / "ledger"
        if real:
            kept = os.environ.get("PRECAST_HOME") or ROOT / ".precast"
            (home / "models").mkdir()
            model = import_model(REAL_MODEL, Path(kept) / "models", report=print).path
            (home / "models" / REAL_MODEL).symlink_to(model)
        else:
            write_model(home / "models" / "tiny")
            ledger.mkdir()
            (ledger / "package").write_bytes(secrets.token_bytes(GRAPH_BYTES))
        redis_url = stack.enter_context(start_redis(home / "redis")).url
        compiler = stack.enter_context(compile_worker(home, redis_url, None if real else ledger))
        fleet = Fleet(home=home, redis_url=redis_url, compiler=compiler, real=real)
        if not real:
            asyncio.run(capture_all(fleet))
        else:
            with launched(fleet) as workers:  # captures, and packs the weights
                eventually(workers[0].is_ready, 1200)
        yield fleet


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.start_together")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--simulated", action="store_true", help="ranks that only answer")
    arguments = parser.parse_args()
    one, many = Way(name="1"), Way(name=f"{arguments.workers} starts", starts=arguments.workers)
    ways = [one, many]
    if not arguments.simulated:
        ways.append(Way(name=f"{arguments.workers} replicas", replicas=arguments.workers))
    starts: dict[str, list[Start]] = {way.name: [] for way in ways}
    fetches: dict[str, list[float]] = {way.name: [] for way in ways}
    with warm_fleet(not arguments.simulated) as fleet:
        for _ in range(arguments.rounds):
            for way in ways:
                starts[way.name].append(start(fleet, way))
                if arguments.simulated:
                    fetches[way.name].append(asyncio.run(fetch(fleet, way.starts)))
    report(starts, fetches)


def report(starts: dict[str, list[Start]], fetches: dict[str, list[float]]) -> None:
    alone_s = statistics.median(each.wall_s for each in starts["1"])
    table = Table("workers", "start s", "x one's", "processor s", "compile worker s", "fetch s")
    for name, found in starts.items():
        wall_s, fetched = statistics.median(each.wall_s for each in found), fetches[name]
        table.add_row(
            name,
            f"{wall_s:.2f}",
            f"{wall_s / alone_s:.2f}",
            f"{statistics.median(each.processor_s for each in found):.2f}",
            f"{statistics.median(each.compiler_s for each in found):.2f}",
            f"{statistics.median(fetched):.3f}" if fetched else "",
        )
    Console().print(table)
    print(f"the last of all is ready, on {os.cpu_count()} cores")
    if all(fetches.values()):
        alone, together = (statistics.median(each) for each in fetches.values())
        print(f"own cores: {(alone_s + together - alone) / alone_s:.2f} x")


if __name__ == "__main__":
    if not (Path.cwd() / "tests" / "support").is_dir():
        sys.exit("run it from the clone's root")
    main()
