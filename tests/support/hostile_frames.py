"""Bytes that are no request, and messages that are no message, for every port that there is.

``python -m tests.support.hostile_frames --count 10000 --seed 1`` sends them to a gateway, a decode
worker and a compile worker, while a client asks for completions, and prints what came of it as
JSON. Exit code 1 if a process ended or grew, a rank was restarted, anything was answered with a
5xx, an error of the server's was logged, or the client's requests failed or waited.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import httpx
import psutil

from precast.system.redis_server import start_redis
from tests.support.compile_worker import WorkerProcess, compile_worker
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.gateway_stack import Gateway, Stack
from tests.support.hostile_bytes import http2_bytes, http_bytes
from tests.support.hostile_messages import Call, calls
from tests.support.models import write_model
from tests.support.plain_http import PLAIN

MODEL: Final = "tiny"
AT_ONCE: Final = 8
LISTEN_S: Final = 0.05
"""How long to wait for an answer to bytes; most get none, or are cut off."""
CALL_S: Final = 10.0
SLOWEST_S: Final = 5.0
"""Longest that the client beside all this may wait for an answer."""
GROWTH_MB: Final = 48
GROWTH_FILES: Final = 16
REFUSED: Final = frozenset(
    {
        *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
        *(grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED),
        *(grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED),
    }
)
"""What a call may end with whose messages are wrong."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    gateway: Gateway
    decode: DecodeWorker
    compile: WorkerProcess

    @property
    def processes(self) -> dict[str, int]:
        return {
            "gateway": self.gateway.process.pid,
            "decode worker": self.decode.process.pid,
            "compile worker": self.compile.process.pid,
        }


@dataclass(kw_only=True)
class Found:
    """What came of them."""

    sent: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What should not be, with what was sent."""
    beside: int = 0
    """Requests of the client that means well."""
    slowest_s: float = 0.0
    grown: dict[str, str] = field(default_factory=dict)


Attack = Callable[[], Any]


def attacks(targets: Targets, count: int, seed: int, found: Found) -> Iterator[Attack]:
    """So many, of every kind; the same for the same seed."""
    rng = random.Random(seed)
    gateway = ("127.0.0.1", targets.gateway.port)
    servers = [_split(targets.decode.address), _split(targets.compile.address)]
    for _ in range(count):
        kind = rng.choice(("http", "http2", "http2", "message", "message"))
        found.sent[kind] += 1
        if kind == "http":
            yield _bytes_to(gateway, http_bytes(rng), found)
        elif kind == "http2":
            yield _bytes_to(rng.choice([*servers, gateway]), http2_bytes(rng), found)
        else:
            call = calls(rng, MODEL)
            address = targets.compile.address if call.of_compiler else targets.decode.address
            yield _call_to(address, call, found)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _bytes_to(address: tuple[str, int], data: bytes, found: Found) -> Attack:
    async def send() -> None:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(*address), CALL_S)
        answer = b""
        with suppress(OSError, TimeoutError):
            writer.write(data)
            await asyncio.wait_for(writer.drain(), CALL_S)
            answer = await asyncio.wait_for(reader.read(4096), LISTEN_S)
        writer.transport.abort()
        status = answer[9:12].decode("latin1") if answer.startswith(b"HTTP/1.") else ""
        found.answers[status or ("other bytes" if answer else "none")] += 1
        if status.startswith("5"):
            found.wrong.append(f"{answer[:300]!r} to {data[:300]!r}")

    return send


def _call_to(address: str, call: Call, found: Found) -> Attack:
    async def send() -> None:
        async with grpc.aio.insecure_channel(address) as channel:
            code = await _code_of(channel, call)
        found.answers[code.name] += 1
        if code not in REFUSED:
            found.wrong.append(f"{code.name} to {call.method} {call.message[:300]!r}")

    return send


async def _code_of(channel: grpc.aio.Channel, call: Call) -> grpc.StatusCode:
    """How the call ends; OK also if it goes on and its answers have begun."""
    try:
        async with asyncio.timeout(CALL_S):
            if call.streams:
                sent: Any = channel.stream_stream(call.method)(iter([call.message]))
                async for _ in sent:
                    pass
            else:
                await channel.unary_unary(call.method)(call.message)
    except grpc.aio.AioRpcError as failure:
        return failure.code()
    except TimeoutError:
        return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.OK


async def batter(targets: Targets, count: int, seed: int, found: Found) -> None:
    """Sends them all, some at once, while somebody asks for completions."""
    left = attacks(targets, count, seed, found)

    async def send() -> None:
        for attack in left:
            try:
                await attack()
            except (OSError, TimeoutError) as error:
                found.wrong.append(f"no connection: {error!r}")

    beside = asyncio.create_task(_ask_on(targets.gateway.url, found))
    try:
        await asyncio.gather(*(send() for _ in range(AT_ONCE)))
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)


async def _ask_on(url: str, found: Found) -> None:
    body = {"model": MODEL, "prompt": "ab", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    async with httpx.AsyncClient(
        base_url=url, timeout=CALL_S, trust_env=False, verify=PLAIN
    ) as client:
        expected = (await client.post("/v1/completions", json=body)).json()["choices"]
        while True:
            began = time.monotonic()
            answer = await client.post("/v1/completions", json=body)
            took_s = time.monotonic() - began
            found.beside += 1
            found.slowest_s = max(found.slowest_s, took_s)
            if answer.status_code != 200 or answer.json()["choices"] != expected:
                found.wrong.append(f"beside it: {answer.status_code} {answer.text[:300]}")
            if took_s > SLOWEST_S:
                found.wrong.append(f"beside it: an answer took {took_s:.1f} s")
            await asyncio.sleep(0.05)


def run(targets: Targets, count: int, seed: int) -> Found:
    """So many; what processes hold is compared with when a quarter of them was through."""
    found, restarts = Found(), targets.decode.status().restarts
    asyncio.run(batter(targets, count // 4, seed, found))
    before = {name: _held(pid) for name, pid in targets.processes.items()}
    asyncio.run(batter(targets, count - count // 4, seed + 1, found))
    if targets.decode.status().restarts != restarts:
        found.wrong.append("the ranks were restarted")
    for name, pid in targets.processes.items():
        _compare(name, before[name], _settled(pid, before[name]), found)
    for name, log in (("decode", targets.decode.log), ("compile", targets.compile.log)):
        found.wrong += [f"{name} worker: {told[:1500]}" for told in _failures(log.read_text())]
    return found


def _failures(log: str) -> list[str]:
    """Tracebacks in a log, but for those that gRPC writes when a caller is gone."""
    told = log.split("Traceback (most recent call last)")[1:]
    return [text for text in told if "ExecuteBatchError" not in text]


def _held(pid: int) -> tuple[float, int]:
    """MB of memory, and open files."""
    process = psutil.Process(pid)
    return process.memory_info().rss / 2**20, process.num_fds()


def _settled(pid: int, before: tuple[float, int], deadline_s: float = 10.0) -> tuple[float, int]:
    """The same when connections that have ended are closed."""
    end = time.monotonic() + deadline_s
    while (held := _held(pid))[1] > before[1] and time.monotonic() < end:
        time.sleep(0.2)
    return held


def _compare(name: str, before: tuple[float, int], after: tuple[float, int], found: Found) -> None:
    memory, files = after[0] - before[0], after[1] - before[1]
    found.grown[name] = f"{memory:+.1f} MB, {files:+d} files"
    if memory > GROWTH_MB or files > GROWTH_FILES:
        found.wrong.append(f"{name} has grown: {found.grown[name]}")


@contextmanager
def targets(home: Path) -> Iterator[Targets]:
    """Running, on a tiny model; gone afterwards. The compile worker has a Redis of its own: nobody
    asks it for graphs."""
    write_model(home / "models" / MODEL)
    with start_redis(home / "redis") as redis, start_redis(home / "redis-2") as other:
        stack = Stack(redis_url=redis.url, models_dir=home / "models", started=[])
        settings = {"batch_sizes": "1,4"}
        try:
            with (
                compile_worker(home / "compile", other.url, home / "ledger") as compiler,
                decode_worker(home, redis.url, MODEL, **settings) as worker,
            ):
                yield Targets(
                    gateway=stack.gateway(log_level="error"), decode=worker, compile=compiler
                )
        finally:
            for process in stack.started:
                process.kill()
                process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.support.hostile_frames")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    with folder as name, targets(Path(name)) as running:
        found = run(running, options.count, options.seed)
    print(json.dumps(found.__dict__, indent=1))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
