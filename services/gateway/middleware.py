"""What every HTTP request passes first: bounds on how many, how large and how slow, and counting.

Plain ASGI, so that streaming and disconnects go through untouched.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.metrics import Metrics
from services.gateway.openai import errors
from services.gateway.openai.errors import ApiError

_BODY_TIMEOUT_S: Final = 30.0
_CLIENT_GONE: Final = 499


class ClientLeft(Exception):
    """The client closed the connection while it sent its body."""


class Admission:
    """Counts and bounds requests, and reads their bodies within bounds."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, max_in_flight: int, max_body_bytes: int
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._max_in_flight = max_in_flight
        self._max_body_bytes = max_body_bytes
        self._in_flight = 0
        metrics.watch(
            "gateway_in_flight_requests",
            "Requests for generations that are running",
            lambda: self._in_flight,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = _StatusWatch(send)
        try:
            if scope["method"] == "POST":
                await self._bounded(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(_endpoint(scope), str(counted.status)).inc()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._in_flight >= self._max_in_flight:
            refusal = errors.overloaded(f"{self._in_flight} requests are running already.")
            await _refuse(refusal, scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self._with_body(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _with_body(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                body = await _read_body(scope, receive, self._max_body_bytes)
        except ClientLeft:
            return
        except TimeoutError:
            await _refuse(_too_slow(), scope, receive, send)
        except ApiError as error:
            await _refuse(error, scope, receive, send)
        else:
            await self._app(scope, _replayed(body, receive), send)


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises ``ApiError`` 413 as soon as it is known to be too large."""
    if _declared_length(scope) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _declared_length(scope: Scope) -> int:
    headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
    value = next((value for name, value in headers if name == b"content-length"), b"0")
    return int(value) if value.isdigit() else 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """``receive`` with the body put back as one message."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    # The rest of the body is not read, so the connection can't be used again.
    error.headers["connection"] = "close"
    await error.response()(scope, receive, send)


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"The request body is larger than {limit} bytes.", code="request_too_large"
    )


def _too_slow() -> ApiError:
    message = f"The request body took longer than {_BODY_TIMEOUT_S:g} s."
    return ApiError(408, message, code="request_timeout")


class _StatusWatch:
    """``send`` that remembers the status; 499 if nothing was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = _CLIENT_GONE

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


def _endpoint(scope: Scope) -> str:
    """The route's path, not the URL's: the number of label values is bounded."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
