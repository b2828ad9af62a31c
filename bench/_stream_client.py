"""A light client of streamed completions: it shares the cores with the server that it measures.

Reads server-sent events off a plain socket. Of OpenAI's answers it looks only at what ends an event
and whether a choice is in it; both servers of a comparison are read by the same code.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

DEADLINE_S = 600.0


@dataclass(kw_only=True)
class Streamed:
    """When one request's pieces came, in seconds of the monotonic clock."""

    begun: float
    pieces: list[float] = field(default_factory=list)
    tokens: int = 0
    """As the server's usage says; without it, the number of pieces."""
    error: str = ""

    @property
    def first_s(self) -> float:
        """From the request to its first piece."""
        return self.pieces[0] - self.begun

    @property
    def gaps_s(self) -> list[float]:
        """Between one piece and the next."""
        return [b - a for a, b in zip(self.pieces, self.pieces[1:], strict=False)]


async def stream(port: int, body: Mapping[str, Any]) -> Streamed:
    """One streamed completion at ``127.0.0.1:port``."""
    whole = {**body, "stream": True, "stream_options": {"include_usage": True}}
    payload = json.dumps(whole).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        "Connection: close\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    found = Streamed(begun=time.monotonic())
    try:
        async with asyncio.timeout(DEADLINE_S):
            writer.write(head.encode() + payload)
            await _read(reader, found)
    finally:
        writer.close()
    return found


async def _read(reader: asyncio.StreamReader, found: Streamed) -> None:
    status = await reader.readline()
    if b" 200 " not in status:
        found.error = (status + await reader.read()).decode(errors="replace")
        return
    while line := await reader.readline():
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            continue
        if b'"completion_tokens"' in line:
            usage = json.loads(line[6:]).get("usage") or {}
            found.tokens = int(usage.get("completion_tokens", 0))
        if b'"choices":[{' in line:
            found.pieces.append(time.monotonic())
        elif b'"error"' in line:
            found.error = line.decode(errors="replace")
    found.tokens = found.tokens or len(found.pieces)


async def burst(port: int, bodies: Sequence[Mapping[str, Any]]) -> list[Streamed]:
    """All of them at once."""
    return await asyncio.gather(*(stream(port, body) for body in bodies))
