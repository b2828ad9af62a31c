"""How long tokens of many streams are on their way: through a gateway over HTTP, and past it.

The worker (``bench._clocked_worker``) writes the time into each token. What counts is made while
all streams run: from the last one's first token to the first one's end.
"""

import asyncio
import json
import re
import statistics
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.rpc.server import COLUMNS, open_channel

PROMPT: Final = list(range(60, 100))
DEADLINE_S: Final = 180.0
_MADE: Final = re.compile(rb"(\d+\.\d{6}) ")


@dataclass(kw_only=True)
class Ages:
    """When tokens were made, and how long they took until they were read, s."""

    made: list[float] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    """When each stream had its first one."""
    ends: list[float] = field(default_factory=list)

    def read(self, text: bytes) -> bool:
        """Takes in the tokens of a text; whether there are any."""
        now, found = time.monotonic(), False
        for match in _MADE.finditer(text):
            made, found = float(match[1]), True
            self.made.append(made)
            self.took.append(now - made)
        return found

    def steady(self) -> "Steady":
        """While all streams ran."""
        begun, over = max(self.firsts), min(self.ends)
        took = [t for made, t in zip(self.made, self.took, strict=True) if begun < made < over]
        cuts = statistics.quantiles(took, n=100)
        return Steady(
            tokens_per_s=len(took) / (over - begun), p50_ms=1e3 * cuts[49], p99_ms=1e3 * cuts[98]
        )


@dataclass(frozen=True, kw_only=True)
class Steady:
    tokens_per_s: float
    p50_ms: float
    p99_ms: float


class _Reader(asyncio.Protocol):
    """One streamed completion; reads no more of it than it must."""

    def __init__(self, request: bytes, ages: Ages, on_end: Callable[[], None]) -> None:
        self._request = request
        self._ages = ages
        self._on_end = on_end
        self._begun = False
        self._ended = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)  # uvloop's is one by its methods

    def data_received(self, data: bytes) -> None:
        if self._ages.read(data) and not self._begun:
            self._begun = True
            self._ages.firsts.append(time.monotonic())
        self._ended = self._ended or b"[DONE]" in data

    def connection_lost(self, exc: Exception | None) -> None:
        if self._begun and self._ended:
            self._ages.ends.append(time.monotonic())
        self._on_end()


async def through(port: int, model: str, streams: int, tokens: int) -> Steady:
    """The gateway at this port."""
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": tokens, "stream": True})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop, ages, left = asyncio.get_running_loop(), Ages(), asyncio.Semaphore(0)
    for _ in range(streams):
        reader = _Reader((head + body).encode(), ages, left.release)
        await loop.create_connection(lambda reader=reader: reader, "127.0.0.1", port)  # type: ignore[misc]
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(streams):
            await left.acquire()
    return _whole(ages, streams, tokens)


async def past(port: int, model: str, streams: int, tokens: int) -> Steady:
    """The worker at this port, on one stream."""
    ages, begun = Ages(), set[int]()
    channel = open_channel(f"127.0.0.1:{port}")
    stub: Any = DecodeServiceStub(channel)
    call = stub.Generate(metadata=[COLUMNS])
    async with asyncio.timeout(DEADLINE_S):
        for handle in range(1, streams + 1):
            start = pb.StartGeneration(
                model=model, prompt_token_ids=PROMPT, stop=pb.StopConditions(max_tokens=tokens)
            )
            request_id = uuid.uuid4().hex
            await call.write(pb.GenerateRequest(request_id=request_id, handle=handle, start=start))
        async for response in call:
            for handle, text in zip(response.step.handles, response.step.texts, strict=True):
                if ages.read(text.encode()) and handle not in begun:
                    begun.add(handle)
                    ages.firsts.append(time.monotonic())
            ages.ends += [time.monotonic()] * len(response.step.ends)
            if len(ages.ends) == streams:
                break
    call.cancel()
    await channel.close(None)
    return _whole(ages, streams, tokens)


def _whole(ages: Ages, streams: int, tokens: int) -> Steady:
    if len(ages.ends) != streams or len(ages.made) != streams * tokens:
        raise SystemExit(f"{len(ages.ends)} streams ended, {len(ages.made)} tokens came")
    return ages.steady()
