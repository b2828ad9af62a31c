"""The way to one worker: a stream that is opened when first needed, and again after a failure."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import grpc.aio

from precast.errors import WorkerUnreachable
from precast.proto.decode.v1.decode_service_pb2 import StartGeneration
from services.gateway.routing.event_queue import Inbox
from services.gateway.routing.stream import WorkerStream, connect

SUSPECT_S: Final = 1.0
"""How long other workers are preferred after this one failed."""


class WorkerLink:
    """Sends requests to one worker. Every wait is bounded."""

    def __init__(self, worker_id: str, address: str) -> None:
        self._worker_id = worker_id
        self._address = address
        self._channel: grpc.aio.Channel | None = None
        self._stream: WorkerStream | None = None
        self._opening = asyncio.Lock()
        self._failed_at = float("-inf")
        self._running = 0
        self._closed = False

    @property
    def suspect(self) -> bool:
        """Whether it failed a moment ago."""
        return time.monotonic() - self._failed_at < SUSPECT_S

    @property
    def idle(self) -> bool:
        return self._running == 0

    @asynccontextmanager
    async def running(self, request_id: str, start: StartGeneration) -> AsyncIterator[Inbox]:
        """Start the request; on leaving, abort it if it hasn't ended.

        Raises ``WorkerUnreachable`` if the worker can't be reached, ``Overloaded`` if it doesn't
        read.
        """
        self._running += 1
        try:
            stream = await self._open_stream()
            inbox = stream.start(request_id, start)
            try:
                yield inbox
            finally:
                stream.forget(request_id)
        finally:
            self._running -= 1

    async def close(self) -> None:
        self._closed = True
        await self._drop()

    async def _open_stream(self) -> WorkerStream:
        stream = self._stream
        if stream is not None and not stream.broken:
            return stream
        asked_at = time.monotonic()
        async with self._opening:
            if self._closed:
                raise WorkerUnreachable(f"Worker {self._worker_id} is gone.")
            if self._failed_at > asked_at:  # else all who wait here would try one after the other
                raise WorkerUnreachable(f"Worker {self._worker_id} can't be reached.")
            if self._stream is None or self._stream.broken:
                await self._drop()
                self._stream = await self._connect()
            return self._stream

    async def _connect(self) -> WorkerStream:
        try:
            self._channel = await connect(self._address)
        except WorkerUnreachable:
            self._on_failure()
            raise
        return WorkerStream(self._channel, self._worker_id, self._on_failure)

    def _on_failure(self) -> None:
        self._failed_at = time.monotonic()

    async def _drop(self) -> None:
        stream, self._stream = self._stream, None
        channel, self._channel = self._channel, None
        if stream is not None:
            await stream.close()
        if channel is not None:
            await channel.close(None)
