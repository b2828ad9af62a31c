"""What the gateway costs: the same worker over HTTP through it, and over gRPC past it.

``python -m bench.gateway_overhead`` starts Redis, a worker without a model and a gateway, and takes
turns between both ways. *Paced*: a token every 10 ms, as from a model; shows the latency that the
gateway adds and whether it keeps up. *Unpaced*: tokens as fast as the worker gives them; shows
where the gateway's own limit is. Worker, gateway and client share the machine's cores, so the
unpaced ratio is that of the whole chain. What a token costs the leader too: ``bench.token_cost``.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.rpc.server import open_channel
from precast.system.redis_server import start_redis
from tests.support.gateway_stack import MODEL, Gateway, Stack, Worker, eventually, running_stack

PROMPT = list(range(60, 100))
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
    """Processor time that the gateway's process has used, in ticks of 10 ms."""
    stat = Path(f"/proc/{gateway.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")


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


def report(title: str, found: dict[str, Round]) -> None:
    direct, gateway = found["direct"], found["gateway"]
    print(title)
    for name, each in found.items():
        print(
            f"  {name:8} {each.tokens_per_s:8.0f} tokens/s   first token {each.first_token_ms:7.1f}"
            f" ms   whole {each.whole_ms:8.1f} ms"
        )
    print(
        f"  ratio    {gateway.tokens_per_s / direct.tokens_per_s:8.3f}"
        f"            added {gateway.first_token_ms - direct.first_token_ms:13.1f} ms"
        f"         {gateway.whole_ms - direct.whole_ms:8.1f} ms"
        f"   gateway's CPU {gateway.gateway_cpu_us:.0f} us a token",
        flush=True,
    )


def run(stack: Stack, step_ms: float, concurrency: int, tokens: int, rounds: int) -> None:
    """One worker and one gateway of their own for one pace."""
    worker = stack.worker(step_ms=step_ms)
    gateway = stack.gateway(log_level="warning")
    found = asyncio.run(
        compare(worker, gateway, concurrency=concurrency, tokens=tokens, rounds=rounds)
    )
    pace = f"a token every {step_ms:g} ms" if step_ms else "unpaced"
    report(f"{pace}, {concurrency} at once, {tokens} tokens each", found)
    gateway.kill()
    worker.kill()
    eventually(lambda: worker.process.poll() is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index, (step_ms, concurrency) in enumerate([(10, 1), (10, 16), (0, 1), (0, 16)]):
            part = folder / str(index)
            with start_redis(part / "redis") as redis, running_stack(redis.url, part) as stack:
                run(stack, step_ms, concurrency, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
