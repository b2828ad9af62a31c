"""uvicorn's HTTP protocol, with deadlines and bounds for slow, hostile and old clients.

What it adds: a deadline and a bound for headers, a bound on connections, answers to clients that
have closed their half of the connection or still send, answers without chunks to HTTP/1.0, and
errors in the API's shape.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    HttpToolsProtocol,
    RequestResponseCycle,
)

from services.gateway.body_writer import offer
from services.gateway.http.refusal import refusal
from services.gateway.presence import Presence, offer_presence

_LINGER_S: Final = 10.0
"""How long a client may take to read the end of its answer after the connection was closed."""
_UNREAD_S: Final = 5.0
_UNREAD_BYTES: Final = 64 << 20
"""How long, and how much, a client may go on sending after an answer that did not wait for it."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Bounds of what one client, or all together, may hold."""

    connections: int
    """More close the one that has waited longest without a request."""
    header_timeout_s: float
    """From a connection's start, or a request's first byte, to the end of its headers."""
    header_bytes: int = 64 << 10
    """The same bounds what comes between pieces of a body, and behind them."""


def limited(limits: ConnectionLimits) -> type["LimitedProtocol"]:
    """The protocol with these limits, as a class for uvicorn's ``http`` setting."""
    return type("LimitedProtocol", (LimitedProtocol,), {"limits": limits})


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[ConnectionLimits]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._header_deadline: asyncio.TimerHandle | None = None
        self._parsed = 0
        """Headers, pieces of bodies, and requests that were complete."""
        self._unparsed_bytes = 0
        """Since the last of these."""
        self._may_send: int | None = None
        """How many bytes more, where the connection is to be closed; None: it is not."""
        self._last_wait: asyncio.TimerHandle | None = None
        """Until the connection is closed."""
        self._waiting_since = self.loop.time()
        self._begun: _BegunAnswer | None = None
        self._client = Presence()

    @property
    def busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._make_room()
        self._expect_headers()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for a request; this one if all are busy."""
        mine = (one for one in self.connections if isinstance(one, LimitedProtocol))
        waiting = [one for one in mine if not one.busy and not one.transport.is_closing()]
        oldest = min(waiting, key=lambda one: one._waiting_since, default=self)
        oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_are_here()
        if self._begun is not None:
            self._begun.stop()
        if self._last_wait is not None:
            self._last_wait.cancel()
        super().connection_lost(exc)
        self._client.end()

    def data_received(self, data: bytes) -> None:
        if self._may_send is not None:
            self._leave_unread(len(data))
            return
        parsed = self._parsed
        super().data_received(data)
        if self.transport.is_closing() or self._may_send is not None:
            return
        self._unparsed_bytes = 0 if self._parsed != parsed else self._unparsed_bytes + len(data)
        if self._unparsed_bytes > self.limits.header_bytes:
            self._refuse(431, f"The headers are larger than {self.limits.header_bytes} bytes.")
        elif self._header_deadline is None and not self.busy:
            self._expect_headers()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._parsed += 1
        self._headers_are_here()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._parsed += 1

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if not self.pipeline:  # a body that came at once has paused it, and nobody would see an end
            self.flow.resume_reading()
        if isinstance(self.cycle.transport, _Unread):  # all of it was
            self.cycle.transport = self.transport
        self._parsed += 1
        self._headers_are_here()

    def _expect_headers(self) -> None:
        timeout_s = self.limits.header_timeout_s
        self._header_deadline = self.loop.call_later(timeout_s, self._headers_are_late)

    def _headers_are_here(self) -> None:
        self._unparsed_bytes = 0
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _headers_are_late(self) -> None:
        self._header_deadline = None
        if self._unparsed_bytes:
            limit = self.limits.header_timeout_s
            self._refuse(408, f"The request's headers took longer than {limit:g} s.")
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "The request is not valid HTTP.")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without a request; the connection can't be used after it."""
        if self.busy:  # an answer within another one's would be no answer
            self.transport.abort()
            return
        self.transport.write(refusal(status, message))
        self._close_behind_client()

    def _close_behind_client(self) -> None:
        """Close when the client has sent what it wants to: with something unread the kernel would
        reset the connection, and the client lose its answer."""
        if self.transport.is_closing():
            return
        self._headers_are_here()
        self._may_send = _UNREAD_BYTES
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._last_wait = self.loop.call_later(_UNREAD_S, self._close_soon)

    def _leave_unread(self, size: int) -> None:
        assert self._may_send is not None, "asked for before the answer"
        self._may_send -= size
        if self._may_send < 0:
            self.transport.abort()

    def _close_soon(self) -> None:
        self.transport.close()
        self.loop.call_later(_LINGER_S, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        self._close_soon()

    def on_response_complete(self) -> None:
        self._waiting_since = self.loop.time()
        if self._may_send is None:
            super().on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _until_the_end(cycle, app)
        if cycle.more_body:
            cycle.transport = _Unread(self.transport, self._close_behind_client)  # type: ignore[assignment]
        offer(cycle)
        offer_presence(cycle.scope, self._client)
        super()._start_asgi_task(cycle, self._closed_in_time(app))

    def _closed_in_time(self, app: ASGIApp) -> Any:  # uvicorn's types of messages are its own
        """``app``; a client that doesn't read what it wrote is not waited for."""

        async def run(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await app(scope, receive, send)
            finally:
                if self.transport.is_closing() or not self.cycle.response_complete:
                    self.loop.call_later(_LINGER_S, self._abort_if_closing)

        return run

    def _abort_if_closing(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Go on for a client that has said all it had to say, if it waits for its answer."""
        if not self.busy or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        if self._begun is None and not self.cycle.response_started and not self.pipeline:
            self._begun = _BegunAnswer(self.transport, self.loop.call_later)
            self.cycle.transport = self._begun  # type: ignore[assignment]
        return True


def _until_the_end(cycle: RequestResponseCycle, app: ASGIApp) -> ASGIApp:
    """``app`` for HTTP/1.0, which knows no chunks: the end of the connection ends the answer."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        unsized = False

        async def plain(message: Message) -> None:
            nonlocal unsized
            if message["type"] == "http.response.start":
                unsized = not any(name == b"content-length" for name, _ in message["headers"])
                if unsized:
                    cycle.chunked_encoding = False
            elif unsized:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, plain)

    return run


class _Unread:
    """The transport of an answer to a request whose body was not read to its end yet."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


class _BegunAnswer:
    """The transport of an answer whose first bytes are sent ahead, one by one.

    A client that has closed its half may wait for its answer or be gone: only what is written to it
    tells, for the kernel of one that is gone resets the connection. The first bytes of any answer
    are known.
    """

    _AHEAD: ClassVar = b"HTTP/1.1 "
    _DELAYS_S: ClassVar = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 120.0)

    def __init__(
        self,
        transport: asyncio.Transport,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
    ) -> None:
        self._transport = transport
        self._call_later = call_later
        self._sent = 0
        self._next: asyncio.TimerHandle | None = None
        self._probe()

    def _probe(self) -> None:
        self._transport.write(self._AHEAD[self._sent : self._sent + 1])
        self._sent += 1
        if self._sent <= len(self._DELAYS_S):
            self._next = self._call_later(self._DELAYS_S[self._sent - 1], self._probe)

    def stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
            self._next = None

    def write(self, data: bytes) -> None:
        self.stop()
        rest, self._sent = data[self._sent :], 0
        self._transport.write(rest)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()
