"""What the gateway costs: the same worker over HTTP through it, and over gRPC past it.

``python -m bench.gateway_overhead`` starts Redis, a worker without a model and a gateway, and takes
turns between both ways. A token every 10 ms, as from a model, shows how much later the first one
comes; tokens as fast as the worker gives them, where the limit is; a thousand streams, how long
tokens are on their way. Worker, gateway and client share the machine's cores, so all is of the
whole chain. What a token costs the leader too: ``bench.token_cost``.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.table import Table

from bench import _many_streams, token_cost
from bench._many_streams import PROMPT
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.rpc.server import open_channel
from precast.system.cpu import this_cpu
from precast.system.process import available_cpus
from precast.system.redis_server import start_redis
from tests.support.gateway_stack import MODEL, Gateway, Stack, Worker, running_stack

_DEADLINE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Round:
    """One burst of concurrent requests, one way."""

    tokens_per_s: float
    first_token_ms: float
    """Median over the requests."""
    whole_ms: float
    """Median over the requests."""
    gateway_cpu_us: float
    """Processor time of the gateway, per token."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure beside what was asked for."""

    figure: str
    measured: str
    asked: str
    cpu_us: float
    """Processor time of the gateway, per token."""


Way = Callable[[int], Awaitable[float]]
"""Runs one request of so many tokens; returns the time of its first token (monotonic, s)."""


async def measure(way: Way, gateway: Gateway, *, concurrency: int, tokens: int) -> Round:
    async def one() -> tuple[float, float]:
        start = time.monotonic()
        first = await way(tokens)
        return first - start, time.monotonic() - start

    start, used = time.monotonic(), cpu_s(gateway)
    async with asyncio.timeout(_DEADLINE_S):
        times = await asyncio.gather(*(one() for _ in range(concurrency)))
    elapsed = time.monotonic() - start
    return Round(
        tokens_per_s=concurrency * tokens / elapsed,
        first_token_ms=1000 * statistics.median(first for first, _ in times),
        whole_ms=1000 * statistics.median(whole for _, whole in times),
        gateway_cpu_us=1e6 * (cpu_s(gateway) - used) / (concurrency * tokens),
    )


def cpu_s(gateway: Gateway) -> float:
    """Processor time that the gateway's process has used."""
    return token_cost.cpu_s(gateway.process.pid)


class Direct:
    """One multiplexed gRPC stream, as the gateway has."""

    def __init__(self, port: int) -> None:
        self._channel = open_channel(f"127.0.0.1:{port}")
        stub: Any = DecodeServiceStub(self._channel)
        self._call = stub.Generate()
        self._lock = asyncio.Lock()
        self._queues: dict[str, asyncio.Queue[pb.GenerateResponse]] = {}
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for response in self._call:
            self._queues[response.request_id].put_nowait(response)

    async def request(self, tokens: int) -> float:
        request_id = uuid.uuid4().hex
        queue = self._queues[request_id] = asyncio.Queue()
        start = pb.StartGeneration(
            model=MODEL, prompt_token_ids=PROMPT, stop=pb.StopConditions(max_tokens=tokens)
        )
        async with self._lock:
            await self._call.write(pb.GenerateRequest(request_id=request_id, start=start))
        first = None
        while (await queue.get()).WhichOneof("event") == "delta":
            first = first or time.monotonic()
        del self._queues[request_id]
        assert first is not None, "the worker refused the request"
        return first

    async def close(self) -> None:
        self._call.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)


class Http:
    """Streamed completions over plain sockets: the client should cost next to nothing."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def request(self, tokens: int) -> float:
        body = json.dumps(
            {"model": MODEL, "prompt": PROMPT, "max_tokens": tokens, "stream": True}
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"data: ")
        assert b" 200 " in answer.partition(b"\r\n")[0], answer
        first = time.monotonic()
        rest = await reader.read(-1)
        assert b"[DONE]" in rest, rest
        writer.close()
        return first


async def compare(
    worker: Worker, gateway: Gateway, *, concurrency: int, tokens: int, rounds: int
) -> dict[str, Round]:
    """Medians over the rounds of both ways, which take turns."""
    direct, http = Direct(worker.port), Http(gateway.port)
    ways: dict[str, Way] = {"direct": direct.request, "gateway": http.request}
    found: dict[str, list[Round]] = {name: [] for name in ways}
    for way in ways.values():  # connections and caches
        await measure(way, gateway, concurrency=2, tokens=4)
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(await measure(way, gateway, concurrency=concurrency, tokens=tokens))
    await direct.close()
    return {name: _median(each) for name, each in found.items()}


def _median(rounds: list[Round]) -> Round:
    return Round(
        tokens_per_s=statistics.median(each.tokens_per_s for each in rounds),
        first_token_ms=statistics.median(each.first_token_ms for each in rounds),
        whole_ms=statistics.median(each.whole_ms for each in rounds),
        gateway_cpu_us=statistics.fmean(each.gateway_cpu_us for each in rounds),
    )


def as_they_come(stack: Stack, concurrency: int, options: argparse.Namespace) -> Row:
    """Tokens as fast as the worker gives them."""
    found = _both_ways(stack, 0, concurrency, options)
    direct, through = found["direct"].tokens_per_s, found["gateway"].tokens_per_s
    return Row(
        figure=f"{concurrency} streams, as fast as they come: through / past",
        measured=f"{through:.0f} / {direct:.0f} tokens/s = {100 * through / direct:.0f} %",
        asked="90 %" if concurrency == 16 else "",
        cpu_us=found["gateway"].gateway_cpu_us,
    )


def first_token(stack: Stack, concurrency: int, options: argparse.Namespace) -> Row:
    """A token every 10 ms, as from a model."""
    found = _both_ways(stack, 10, concurrency, options)
    added = found["gateway"].first_token_ms - found["direct"].first_token_ms
    return Row(
        figure=f"{concurrency} streams, a token every 10 ms: first token later by",
        measured=f"{added:.1f} ms",
        asked="2 ms" if concurrency == 1 else "",
        cpu_us=found["gateway"].gateway_cpu_us,
    )


def many(stack: Stack, options: argparse.Namespace) -> Row:
    """A thousand streams, in groups that step one after the other."""
    streams, tokens = options.streams, options.many_tokens
    port = _clocked_worker(stack, options)
    gateway = stack.gateway(log_level="warning", worker_refresh_s=token_cost.REFRESH_S)
    past = uvloop.run(_many_streams.past(port, MODEL, streams, tokens))
    used = cpu_s(gateway)
    through = uvloop.run(_many_streams.through(gateway.port, MODEL, streams, tokens))
    cpu_us = 1e6 * (cpu_s(gateway) - used) / (streams * tokens)
    return Row(
        figure=f"{streams} streams at {through.tokens_per_s:.0f} tokens/s: p99 later by",
        measured=f"{through.p99_ms - past.p99_ms:.1f} ms ({through.p99_ms:.1f} - {past.p99_ms:.1f};"
        f" p50 {through.p50_ms:.1f} - {past.p50_ms:.1f})",
        asked="20 ms at 10000 tokens/s",
        cpu_us=cpu_us,
    )


def _clocked_worker(stack: Stack, options: argparse.Namespace) -> int:
    """Its port."""
    command = [sys.executable, "-m", "bench._clocked_worker", f"--redis-url={stack.redis_url}"]
    command += [f"--groups={options.groups}", f"--step-ms={options.step_ms}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.started.append(process)
    assert process.stdout is not None
    return int(process.stdout.readline())


def _both_ways(
    stack: Stack, step_ms: float, concurrency: int, options: argparse.Namespace
) -> dict[str, Round]:
    """One worker and one gateway."""
    worker = stack.worker(step_ms=step_ms)
    gateway = stack.gateway(log_level="warning", worker_refresh_s=token_cost.REFRESH_S)
    rounds = options.rounds
    return asyncio.run(
        compare(worker, gateway, concurrency=concurrency, tokens=options.tokens, rounds=rounds)
    )


def report(rows: Sequence[Row]) -> None:
    table = Table("what", "measured", "asked", "gateway's processor time a token")
    for row in rows:
        table.add_row(row.figure, row.measured, row.asked, f"{row.cpu_us:.0f} us")
    Console().print(table)
    print(f"{this_cpu().model}, {len(available_cpus())} threads, all of it on the same cores")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--many-tokens", type=int, default=130)
    parser.add_argument("--groups", type=int, default=32, help="that step one after the other")
    parser.add_argument("--step-ms", type=float, default=80.0, help="of each group")
    parser.add_argument("--only", choices=list(PARTS), action="append")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for part in options.only or PARTS:
            folder = Path(name) / part
            with start_redis(folder / "redis") as redis, running_stack(redis.url, folder) as stack:
                rows.append(PARTS[part](stack, options))
    report(rows)


PARTS: Final[Mapping[str, Callable[[Stack, argparse.Namespace], Row]]] = {
    "first": lambda stack, options: first_token(stack, 1, options),
    "first16": lambda stack, options: first_token(stack, 16, options),
    "fast": lambda stack, options: as_they_come(stack, 1, options),
    "fast16": lambda stack, options: as_they_come(stack, 16, options),
    "many": many,
}


if __name__ == "__main__":
    main()
