"""What a token costs on its way from a rank to a socket: processor time of leader and gateway.

    python -m bench.token_cost [--streams 1,16] [--step-ms 8] [--tokens 400] [--rounds 3]

Starts Redis, a decode worker whose rank only answers after ``--step-ms``, as a model would, and a
gateway; reads streamed completions off plain sockets. Processor time is what the kernel counts for
the process and all its threads, so other load on the machine matters little; caches are as cold as
between two steps of a model. Prompts cost something too, but little beside so many tokens.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench._stream_client import burst
from precast.system.redis_server import start_redis
from tests.support.decode_worker import DecodeWorker, eventually
from tests.support.gateway_stack import ROOT, Gateway, Stack
from tests.support.models import write_model
from tests.support.ports import free_port

MODEL = "tiny"
PROMPT = list(range(1, 9))
_WARM_TOKENS = 20
REFRESH_S = 2.0
"""A gateway's own default; those of tests look more often for new workers."""
_LEADER = (
    "import sys; from precast.config.settings import DecodeWorkerSettings, load_settings;"
    "from services.decode_worker.ranks.launcher import RankLauncher;"
    "from services.decode_worker.engine.sizing import shares;"
    "from services.decode_worker.main import run;"
    "settings = load_settings(DecodeWorkerSettings);"
    "launcher = RankLauncher('tests.support.simulated_rank');"
    "sys.exit(run(settings, launcher, shares(settings)[0]))"
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Processor time of a token, microseconds."""

    leader_us: float
    gateway_us: float

    @property
    def total_us(self) -> float:
        return self.leader_us + self.gateway_us


def cpu_s(pid: int) -> float:
    """Processor time that the threads of a process have used."""
    used = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            used += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return used / 1e9


@contextmanager
def leader(home: Path, redis_url: str, step_ms: float) -> Iterator[DecodeWorker]:
    """A decode worker with one simulated rank."""
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "home": str(home),
        "redis_url": redis_url,
        "listen": address,
        "model": MODEL,
        "max_batch_size": "32",
        "prefill_buckets": "",
    }
    environment = {f"PRECAST_{name.upper()}": value for name, value in settings.items()}
    environment["PRECAST_SIMULATED_STEP_MS"] = str(step_ms)
    log = home / "leader.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _LEADER],
            cwd=ROOT,
            stdout=file,
            stderr=file,
            env={**os.environ, **environment},
        )
    worker = DecodeWorker(process=process, address=address, log=log, model=MODEL)
    try:
        eventually(worker.is_ready, 60)
        yield worker
    finally:
        process.terminate()
        process.wait()


async def measure(worker: DecodeWorker, gateway: Gateway, streams: int, tokens: int) -> Cost:
    """Of one burst of streams."""
    pids = worker.process.pid, gateway.process.pid
    body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True}
    await burst(gateway.port, [{**body, "max_tokens": _WARM_TOKENS}] * streams)
    before = [cpu_s(pid) for pid in pids]
    found = await burst(gateway.port, [{**body, "max_tokens": tokens}] * streams)
    used = [cpu_s(pid) - was for pid, was in zip(pids, before, strict=True)]
    if any(one.error or one.tokens != tokens for one in found):
        raise SystemExit(f"a request failed: {[one.error or one.tokens for one in found]}")
    each = [1e6 * one / (streams * tokens) for one in used]
    return Cost(leader_us=each[0], gateway_us=each[1])


def report(streams: int, rounds: list[Cost]) -> None:
    """The median of the rounds, by their sum."""
    middle = statistics.median_low(cost.total_us for cost in rounds)
    cost = next(cost for cost in rounds if cost.total_us == middle)
    every = ", ".join(f"{one.total_us:.0f}" for one in rounds)
    print(
        f"{streams:3} streams: leader {cost.leader_us:5.0f} us, gateway {cost.gateway_us:5.0f} us,"
        f" together {cost.total_us:5.0f} us a token   (rounds: {every})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--tokens", type=int, default=230)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_model(home / "models" / MODEL)
        with (
            start_redis(home / "redis") as redis,
            leader(home, redis.url, options.step_ms) as worker,
        ):
            stack = Stack(redis_url=redis.url, models_dir=home / "models", started=[])
            try:
                gateway = stack.gateway(log_level="warning", worker_refresh_s=REFRESH_S)
                for streams in map(int, options.streams.split(",")):
                    costs = [
                        asyncio.run(measure(worker, gateway, streams, options.tokens))
                        for _ in range(options.rounds)
                    ]
                    report(streams, costs)
            finally:
                for process in stack.started:
                    process.kill()


if __name__ == "__main__":
    main()
