"""The messages of a gRPC stream between two processes of one host, without gRPC.

gRPC costs each side 150 us of processor time and more for a message, on the cores that compute
tokens. Here a message is its length and its bytes on a Unix socket. A server has a name in the
abstract namespace, which ends with its process and is seen in its network namespace alone: who
finds it is on the same host, and who doesn't takes gRPC. Only processes of one user are connected.

A server has two names, of which the second is that of connections whose messages say of which kind
they are: what a step gives comes as ``StepTokens`` there, where that can say it. Processes of an
older version know the first one alone.
"""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final, cast

import msgspec
from google.protobuf.message import DecodeError, Message

from precast.errors import PrecastError
from precast.log import get_logger
from precast.rpc import step_tokens
from precast.rpc.server import MAX_MESSAGE_BYTES
from precast.rpc.step_tokens import StepTokens

log = get_logger(__name__)

SLOW_READER_S: Final = 20.0
"""How long a peer may read nothing before it is given up."""
_LENGTH: Final = struct.Struct("<I")
_LENGTH_AND_KIND: Final = struct.Struct("<IB")
_BEGUN_BYTES: Final = _LENGTH_AND_KIND.size
_PROTOBUF: Final = 0
_TOKENS: Final = 1
_SMALL: Final = 1024
_TOKENS_BEGUN: Final = tuple(_LENGTH_AND_KIND.pack(size, _TOKENS) for size in range(_SMALL))
"""What messages of tokens begin with, by their size, where they are small."""
_WITH_KINDS: Final = "/2"
"""Behind the name of a server for such connections."""
_CREDENTIALS: Final = struct.Struct("3i")
"""Process, user and group, as the kernel tells them."""
_MAX_UNREAD: Final = 64
"""Messages that wait for their handler before no more are read."""


Handler = Callable[[AsyncIterator[Any], "LocalLink"], AsyncIterator[Any]]
"""A stream-stream method: requests in, responses out. Either ends the connection. It may also send
on the link itself while that ``is_writable``, between two of its responses."""

NO_MESSAGE: Final = (msgspec.DecodeError, DecodeError, PrecastError)
"""What tells that bytes are none, or none that makes sense to who gets it."""


class LocalLink(asyncio.Protocol):
    """One end of a connection."""

    def __init__(self, *, kinds: bool = False) -> None:
        """``kinds``: messages say of which they are."""
        self.kinds: Final = kinds
        self._header = _LENGTH_AND_KIND if kinds else _LENGTH
        self._early: list[bytes] = []
        """What came before anybody wanted it."""
        self._on_message: Callable[[bytes], None] = self._early.append
        self._on_tokens: Callable[[StepTokens], None] | None = None
        self._tokens: list[StepTokens] = []
        """That have come, behind the messages before them."""
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._write: Callable[[bytes], object] = _drop
        """Of the transport, which sends at once where that can be."""
        self._writable = asyncio.Event()
        self._writable.set()
        self.is_writable = True
        """Whether the peer reads what it is sent."""
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the connection has ended."""

    def deliver(
        self,
        on_message: Callable[[bytes], None],
        on_tokens: Callable[[StepTokens], None] | None = None,
    ) -> None:
        """``on_message`` is called with each message that has come or will; ``on_tokens`` with
        those of tokens, which come behind others."""
        early, self._early = self._early, []
        self._on_message, self._on_tokens = on_message, on_tokens if self.kinds else None
        for message in early:
            on_message(message)
        self._hand_out_tokens()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._write = self._transport.write

    def data_received(self, data: bytes) -> None:
        # Nearly always: one whole message of tokens, and nothing that waits for the rest of it.
        size = len(data) - _BEGUN_BYTES
        alone = 0 < size < _SMALL and not self._buffer and not self._tokens
        on_tokens = self._on_tokens if alone else None
        try:
            if on_tokens is not None and data.startswith(_TOKENS_BEGUN[size]):
                on_tokens(step_tokens.decode(data[_BEGUN_BYTES:]))
                return
            self._buffer += data
            self._take_whole()
        except NO_MESSAGE as error:
            log.error("what came is no message; closing the connection", reason=str(error))
            self.abort()

    def _take_whole(self) -> None:
        """Hand out the messages that are complete."""
        at, size = 0, self._header.size
        while len(self._buffer) - at >= size:
            length, *kind = self._header.unpack_from(self._buffer, at)
            if length > MAX_MESSAGE_BYTES:
                log.error("message too large", size=length)
                self.abort()
                return
            start, end = at + size, at + size + length
            if len(self._buffer) < end:
                break
            self._take(kind, bytes(self._buffer[start:end]))
            at = end
        del self._buffer[:at]
        self._hand_out_tokens()

    def _take(self, kind: list[int], message: bytes) -> None:
        if kind == [_TOKENS]:
            self._tokens.append(step_tokens.decode(message))
        else:
            self._hand_out_tokens()
            self._on_message(message)

    def _hand_out_tokens(self) -> None:
        """What has come at once is handed out at once."""
        if self._tokens and self._on_tokens is not None:
            tokens, self._tokens = self._tokens, []
            self._on_tokens(step_tokens.merged(tokens))

    def pause_writing(self) -> None:
        self.is_writable = False
        self._writable.clear()

    def resume_writing(self) -> None:
        self.is_writable = True
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.resume_writing()
        self._write = _drop
        if not self.lost.done():
            self.lost.set_result(None)

    def read_on(self, *, wanted: bool) -> None:
        """Stop reading for a while, or begin again."""
        if self._transport is not None and not self._transport.is_closing():
            (self._transport.resume_reading if wanted else self._transport.pause_reading)()

    def send(self, message: Message) -> None:
        data = message.SerializeToString()
        header = (len(data), _PROTOBUF) if self.kinds else (len(data),)
        self._write(self._header.pack(*header) + data)

    def send_tokens(self, tokens: StepTokens) -> None:
        """Only where there are ``kinds``."""
        data = step_tokens.encode(tokens)
        size = len(data)
        small = size < _SMALL
        begun = _TOKENS_BEGUN[size] if small else _LENGTH_AND_KIND.pack(size, _TOKENS)
        self._write(begun + data)

    async def writable(self) -> None:
        """Waits for a slow peer. Raises ``TimeoutError`` if it is too slow."""
        if not self._writable.is_set():
            async with asyncio.timeout(SLOW_READER_S):
                await self._writable.wait()

    def close(self) -> None:
        """What was sent still goes out."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


async def connect_locally(name: str) -> LocalLink | None:
    """A connection to the server of this name; None if there is none on this host for us."""
    return await _connect(name, kinds=True) or await _connect(name, kinds=False)


async def _connect(name: str, *, kinds: bool) -> LocalLink | None:
    loop = asyncio.get_running_loop()
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        client.connect(_address(name, kinds=kinds))  # never waits: it is refused, or done
        if not of_our_user(client):
            raise PermissionError("another user's process")
        _, link = await loop.create_unix_connection(lambda: LocalLink(kinds=kinds), sock=client)
    except OSError:
        client.close()
        return None
    return link


@asynccontextmanager
async def serving_locally(
    name: str, handler: Handler, parse: Callable[[bytes], Any]
) -> AsyncIterator[None]:
    """Serves ``handler`` under a name that nobody else has, to processes of the same user."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def begin(link: _ServerLink) -> None:
        task = loop.create_task(_serve(link, handler, parse))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    servers = [await _listen(name, begin, kinds=kinds) for kinds in (True, False)]
    try:
        yield
    finally:
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _listen(
    name: str, begin: "Callable[[_ServerLink], None]", *, kinds: bool
) -> asyncio.Server:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind(_address(name, kinds=kinds))
    loop = asyncio.get_running_loop()
    return await loop.create_unix_server(lambda: _ServerLink(begin, kinds=kinds), sock=listener)


class _ServerLink(LocalLink):
    """Puts messages into a queue, and reads no more while it is full."""

    def __init__(self, begin: "Callable[[_ServerLink], None]", *, kinds: bool) -> None:
        super().__init__(kinds=kinds)
        self._begin = begin
        self._unread: asyncio.Queue[bytes] = asyncio.Queue()
        self.deliver(self._put)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if of_our_user(transport.get_extra_info("socket")):
            self._begin(self)
        else:
            self.abort()

    async def message(self) -> bytes:
        """The next one."""
        message = await self._unread.get()
        if self._unread.qsize() == _MAX_UNREAD - 1:
            self.read_on(wanted=True)
        return message

    def _put(self, message: bytes) -> None:
        self._unread.put_nowait(message)
        if self._unread.qsize() == _MAX_UNREAD:
            self.read_on(wanted=False)


async def _serve(link: _ServerLink, handler: Handler, parse: Callable[[bytes], Any]) -> None:
    """One connection, until either end is done with it."""
    answering = asyncio.create_task(_answer(link, handler, parse))
    try:
        await asyncio.wait({answering, link.lost}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        answering.cancel()
        (failure,) = await asyncio.gather(answering, return_exceptions=True)
        link.close()
    if isinstance(failure, TimeoutError):
        log.warning("a local connection reads nothing; closing it")
        link.abort()
    elif isinstance(failure, Exception):
        log.error("local connection failed", exc_info=failure)


async def _answer(link: _ServerLink, handler: Handler, parse: Callable[[bytes], Any]) -> None:
    async def requests() -> AsyncIterator[Any]:
        while True:
            yield parse(await link.message())

    responses: Any = handler(requests(), link)
    async with aclosing(responses):
        async for response in responses:
            await link.writable()
            link.send(response)


def of_our_user(connected: socket.socket) -> bool:
    """Whether the peer of a connected Unix socket is a process of the same user."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(raw)[1] == os.geteuid())


def _drop(_: bytes) -> None:
    """There is nobody to send it to."""


def _address(name: str, *, kinds: bool) -> str:
    return f"\0precast-{name}{_WITH_KINDS if kinds else ''}"
