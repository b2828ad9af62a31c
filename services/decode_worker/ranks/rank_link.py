"""The leader's end of its connection to one rank: frames in, frames out."""

import asyncio
from collections.abc import Callable
from typing import cast

from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    MAX_FRAME_BYTES,
    Reply,
    decode_reply,
)


class RankLink(asyncio.Protocol):
    def __init__(
        self,
        index: int,
        on_reply: "Callable[[RankLink, Reply], None]",
        on_end: Callable[[str], None],
    ) -> None:
        """``on_end`` is told why nothing more comes."""
        self.index = index
        self.replies: asyncio.Queue[Reply] = asyncio.Queue()
        """For those that nobody handles as they come."""
        self.transport: asyncio.Transport | None = None
        self._on_reply = on_reply
        self._on_end = on_end
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= FRAME_HEADER.size:
            (size,) = FRAME_HEADER.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                self._on_end(f"rank {self.index} sent a frame of {size} bytes")
                return
            end = FRAME_HEADER.size + size
            if len(self._buffer) < end:
                return
            reply = decode_reply(bytes(self._buffer[FRAME_HEADER.size : end]))
            del self._buffer[:end]
            self._on_reply(self, reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end(f"rank {self.index} died")

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()
