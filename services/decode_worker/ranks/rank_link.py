"""The leader's end of its connection to one rank: frames in, frames out."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final, cast

from services.decode_worker.ranks.protocol import (
    FRAME_HEADER,
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Reply,
    StepDone,
    decode_reply,
)

_SMALL: Final = 1024
_BEGUN: Final = tuple(map(FRAME_HEADER.pack, range(_SMALL)))
"""What small frames begin with, by their size."""


class RankLink(asyncio.Protocol):
    def __init__(
        self,
        index: int,
        connection: socket.socket,
        on_step: Callable[[StepDone], None],
        on_reply: "Callable[[RankLink, Reply], None]",
        on_end: Callable[[str], None],
    ) -> None:
        """``on_step`` gets answers to steps, ``on_reply`` all else; ``on_end`` is told why nothing
        more comes."""
        self.index = index
        self._connection = connection
        self.replies: asyncio.Queue[Reply] = asyncio.Queue()
        """For those that nobody handles as they come."""
        self.transport: asyncio.Transport | None = None
        self.send: Callable[[bytes], object] = _drop
        """Sends bytes, at once where that can be; nothing where the rank is gone."""
        self._on_step = on_step
        self._on_reply = on_reply
        self._on_end = on_end
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods
        self.send = self.transport.write

    def data_received(self, data: bytes) -> None:
        # Nearly always: one whole frame, an answer to a step, and nothing that waits for the rest.
        size = len(data) - HEADER_BYTES
        alone = not self._buffer and 0 <= size < _SMALL and data.startswith(_BEGUN[size])
        for body in (data[HEADER_BYTES:],) if alone else self._whole(data):
            reply = decode_reply(body)
            if isinstance(reply, StepDone):
                self._on_step(reply)
            else:
                self._on_reply(self, reply)

    def _whole(self, data: bytes) -> Iterator[bytes]:
        """The bodies of the frames that are complete with it."""
        self._buffer += data
        while len(self._buffer) >= FRAME_HEADER.size:
            (size,) = FRAME_HEADER.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                self._on_end(f"rank {self.index} sent a frame of {size} bytes")
                return
            end = FRAME_HEADER.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[FRAME_HEADER.size : end])
            del self._buffer[:end]
            yield body

    def connection_lost(self, exc: Exception | None) -> None:
        self.send = _drop
        self._on_end(f"rank {self.index} died")

    def send_with(self, data: bytes, descriptor: int) -> None:
        """``send``, and a descriptor of this process with it; the first of all messages."""
        assert self.transport is not None
        sent = 0
        with suppress(OSError):  # it is broken: the transport finds out
            sent = socket.send_fds(self._connection, [data], [descriptor])
        if sent < len(data):
            self.transport.write(data[sent:])

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    @property
    def is_open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()


def _drop(_: bytes) -> None:
    """There is nobody to send it to."""
