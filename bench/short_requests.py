"""100,000 short requests: whether the memory and the descriptors of leader, rank and gateway grow.

    python -m bench short_requests [--requests 100000] [--clients 16]

The rank is simulated, so that nearly all of the time is the services' own. Every fourth request is
streamed, every eighth leaves in the middle of its answer, and every tenth is refused. Prints what
each process has after every tenth of them; the first tenth warms up. The exit code says whether
any grew by more than ``MOST_MB`` or ``MOST_DESCRIPTORS`` since.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from bench.figures import record
from bench.token_cost import MODEL, leader
from precast.system.redis_server import start_redis
from tests.support.gateway_stack import Gateway, Stack
from tests.support.models import write_model

MOST_MB: Final = 16.0
MOST_DESCRIPTORS: Final = 8
ANSWER_S: Final = 60.0
STREAMED, LEFT, REFUSED = 4, 8, 10
"""One in so many."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process has."""

    megabytes: float
    """Its own: what it shares with nobody."""
    descriptors: int


class Client:
    """One connection, used again as long as it lasts."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, number: int) -> None:
        body: dict[str, Any] = {"model": MODEL, "prompt": [1 + number % 200, 2, 3], "max_tokens": 3}
        body["stream"] = number % STREAMED == 0
        if number % REFUSED == 0:
            body["max_tokens"] = -1
        async with asyncio.timeout(ANSWER_S):
            await self._send(json.dumps(body).encode())
            if number % LEFT == 0:
                self.close()  # before its answer is there
            else:
                await self._read(refused=number % REFUSED == 0)

    async def _send(self, body: bytes) -> None:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n"
        self._streams[1].write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)

    async def _read(self, *, refused: bool) -> None:
        assert self._streams is not None
        reader = self._streams[0]
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if (b" 400 " if refused else b" 200 ") not in head.split(b"\r\n")[0]:
            raise SystemExit(f"a request failed: {head!r}")
        if b"chunked" in head:
            while size := int(await reader.readline(), 16):
                await reader.readexactly(size + 2)
            await reader.readline()
        else:
            length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
            await reader.readexactly(int(length))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


async def burst(port: int, first: int, count: int, clients: int) -> None:
    numbers = iter(range(first, first + count))

    async def work() -> None:
        client = Client(port)
        for number in numbers:
            await client.ask(number)
        client.close()

    await asyncio.gather(*(work() for _ in range(clients)))


def held(process: psutil.Process) -> Held:
    memory = process.memory_full_info().uss / 2**20
    return Held(megabytes=memory, descriptors=process.num_fds())


def processes(leader_pid: int, gateway: Gateway) -> dict[str, psutil.Process]:
    own = psutil.Process(leader_pid)
    [rank] = [p for p in own.children() if "simulated_rank" in " ".join(p.cmdline())]
    return {"leader": own, "rank": rank, "gateway": psutil.Process(gateway.process.pid)}


def run(options: argparse.Namespace, watched: dict[str, psutil.Process], port: int) -> list[Any]:
    """What each process had after each tenth."""
    found = []
    tenth = options.requests // 10
    for number in range(10):
        asyncio.run(burst(port, number * tenth, tenth, options.clients))
        found.append({name: held(process) for name, process in watched.items()})
        shown = (f"{n} {h.megabytes:.1f} MB, {h.descriptors} fds" for n, h in found[-1].items())
        print(f"{(number + 1) * tenth}: {'; '.join(shown)}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_model(home / "models" / MODEL)
        with start_redis(home / "redis") as redis, leader(home, redis.url, 0.0) as worker:
            stack = Stack(redis_url=redis.url, models_dir=home / "models", started=[])
            try:
                gateway = stack.gateway(log_level="error")
                watched = processes(worker.process.pid, gateway)
                found = run(options, watched, gateway.port)
            finally:
                for process in stack.started:
                    process.kill()
    first, last = found[0], found[-1]
    rows = [
        [
            name,
            f"{first[name].megabytes:.1f}",
            f"{last[name].megabytes:.1f}",
            str(first[name].descriptors),
            str(last[name].descriptors),
        ]
        for name in watched
    ]
    record("short_requests", ["process", "MB after a tenth", "MB", "descriptors", "then"], rows)
    sys.exit(any(_grew(first[name], last[name]) for name in watched))


def _grew(first: Held, last: Held) -> bool:
    more = last.megabytes - first.megabytes, last.descriptors - first.descriptors
    return more[0] > MOST_MB or more[1] > MOST_DESCRIPTORS


if __name__ == "__main__":
    main()
