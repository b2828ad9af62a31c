"""The server's bounds on connections, with small limits: an app of a few lines, real sockets."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from services.gateway.http.protocol import ConnectionLimits, limited
from services.gateway.presence import WhileConnected

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = 50 << 20
DEADLINE_S = 30.0
SHORT_S = 0.5


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """``/wait`` never answers, nor does ``/read``, which reads the body; ``/large`` has more to say
    than any buffer holds."""
    if scope["path"] == "/read":
        while (await receive())["more_body"]:
            pass
        async with WhileConnected(scope, receive):
            await asyncio.sleep(60)
    if scope["path"] == "/wait":
        await receive()
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    body = bytes(LARGE) if scope["path"] == "/large" else b"ok"
    headers = [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
    if scope["path"] == "/":
        headers.pop()
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
async def server(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[uvicorn.Server]:
    """At most 4 connections, and 0.5 s to read the end of an answer."""
    monkeypatch.setattr("services.gateway.http.protocol._LINGER_S", SHORT_S)
    async with serving(ConnectionLimits(connections=4, header_timeout_s=DEADLINE_S)) as server:
        yield server


@pytest.fixture
async def hasty_server() -> AsyncIterator[uvicorn.Server]:
    """0.5 s for headers."""
    async with serving(ConnectionLimits(connections=4, header_timeout_s=SHORT_S)) as server:
        yield server


@contextlib.asynccontextmanager
async def serving(limits: ConnectionLimits) -> AsyncIterator[uvicorn.Server]:
    config = uvicorn.Config(app, port=0, http=limited(limits), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server._serve())
    await until(lambda: server.started)
    yield server
    server.should_exit = server.force_exit = True
    await task


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():
            await asyncio.sleep(0.01)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def ask(self, path: str = "/") -> bytes:
        self.writer.write(REQUEST.replace(b"/", path.encode(), 1))
        return await asyncio.wait_for(self.reader.readuntil(b"ok"), DEADLINE_S)

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(), DEADLINE_S)
        return b""


async def connect(server: uvicorn.Server) -> Client:
    port = server.servers[0].sockets[0].getsockname()[1]
    return Client(*await asyncio.open_connection("127.0.0.1", port))


async def test_a_new_connection_closes_the_one_that_waited_longest(server: uvicorn.Server) -> None:
    busy = await connect(server)
    busy.writer.write(REQUEST.replace(b"/", b"/wait", 1))
    used = [await connect(server) for _ in range(3)]
    for client in reversed(used):
        await client.ask()
    newest = await connect(server)
    assert await newest.ask()
    assert await used[2].rest() == b""
    assert await used[1].ask()
    assert await used[0].ask()
    assert not busy.reader.at_eof()


async def test_if_all_are_busy_the_new_one_is_closed(server: uvicorn.Server) -> None:
    busy = [await connect(server) for _ in range(4)]
    for client in busy:
        client.writer.write(REQUEST.replace(b"/", b"/wait", 1))
    await until(lambda: len(server.server_state.tasks) == len(busy))
    assert await (await connect(server)).rest() == b""
    assert not any(client.reader.at_eof() for client in busy)


@pytest.mark.parametrize(
    ("used", "sent", "answer"),
    [
        (False, b"", b""),
        (False, b"\r\n", b"HTTP/1.1 408"),
        (False, b"GET / HT", b"HTTP/1.1 408"),
        (False, REQUEST[:-2], b"HTTP/1.1 408"),
        (True, b"\r\n", b"HTTP/1.1 408"),
        (True, REQUEST[:-2], b"HTTP/1.1 408"),
    ],
)
async def test_headers_have_a_deadline(
    hasty_server: uvicorn.Server, used: bool, sent: bytes, answer: bytes
) -> None:
    client = await connect(hasty_server)
    if used:
        await client.ask()
    client.writer.write(sent)
    assert (await client.rest()).partition(b" Re")[0] == answer


async def test_the_rest_of_a_body_that_nobody_reads_has_a_deadline(
    hasty_server: uvicorn.Server,
) -> None:
    client = await connect(hasty_server)
    client.writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 999999\r\n\r\n")
    assert await asyncio.wait_for(client.reader.readuntil(b"ok"), DEADLINE_S)
    # one reader for all of it: a reset is an end as well, and only whoever reads is told of it
    closed = asyncio.ensure_future(client.rest())
    while not closed.done():
        client.writer.write(b"x")
        await asyncio.wait({closed}, timeout=0.1)
    assert closed.result() == b""


async def test_a_client_that_does_not_read_is_dropped(server: uvicorn.Server) -> None:
    client = await connect(server)
    client.writer.write(REQUEST.replace(b"/", b"/large", 1))
    await until(lambda: bool(server.server_state.connections))
    begun = asyncio.get_running_loop().time()
    await until(lambda: not server.server_state.connections)
    assert asyncio.get_running_loop().time() - begun > SHORT_S / 2  # not at once


async def test_a_client_that_leaves_after_a_large_body_is_noticed(server: uvicorn.Server) -> None:
    """All of the body is read at once, after the head: the server stops reading for that much."""
    [listener] = server.servers[0].sockets
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    with socket.create_connection(("127.0.0.1", listener.getsockname()[1])) as client:
        client.sendall(b"POST /read HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n")
        await asyncio.sleep(0.2)
        client.sendall(bytes(200_000))  # without a turn of the loop that reads it
        await asyncio.sleep(0.2)
        assert len(server.server_state.connections) == 1
    await until(lambda: not server.server_state.connections)


async def test_pipelined_requests_are_answered_in_order(server: uvicorn.Server) -> None:
    client = await connect(server)
    client.writer.write(REQUEST * 3)
    for _ in range(3):
        assert b"200 OK" in await asyncio.wait_for(client.reader.readuntil(b"ok"), DEADLINE_S)
