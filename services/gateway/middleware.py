"""What every HTTP request passes first: small mistakes put right, a bound on how many, counting.

Plain ASGI, so that streaming and disconnects go through untouched.
"""

import time
from collections.abc import Collection
from contextlib import ExitStack

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from precast.errors import Overloaded
from precast.log import get_logger
from services.gateway import request_id
from services.gateway.in_flight import InFlight
from services.gateway.metrics import Metrics
from services.gateway.openai import errors
from services.gateway.status_watch import StatusWatch

log = get_logger(__name__)


class PrivatePort:
    """Sends what came in on one port to an app of its own."""

    def __init__(self, app: ASGIApp, *, private: ASGIApp, port: int) -> None:
        self._app = app
        self._private = private
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = scope.get("server") if scope["type"] == "http" else None
        here = server is not None and server[1] == self._port
        await (self._private if here else self._app)(scope, receive, send)


class Leniency:
    """Answers HEAD like GET (the server leaves out the body), and ignores slashes at the end."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "path": _without_slashes(scope)}
        await self._app(scope, receive, send)


def _without_slashes(scope: Scope) -> str:
    """The path without slashes at its end, of which those in the name of a model are none."""
    path, raw = str(scope["path"]), scope.get("raw_path") or b""
    slashes = len(raw) - len(raw.rstrip(b"/"))
    return path[: len(path) - slashes] or "/"


class RequestIds:
    """Names requests. The outermost of what a request passes, so that refusals have a name too.
    With ``access_log`` there is a line in the log for each."""

    def __init__(self, app: ASGIApp, *, access_log: bool = False) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id.name_for(Headers(scope=scope).get(request_id.HEADER, ""))
        started = time.monotonic()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                for header in request_id.headers_at(scope["path"]):
                    MutableHeaders(scope=message)[header] = name
            await send(message)

        watched = StatusWatch(named)
        with bound_contextvars(request_id=name):
            try:
                await self._app(request_id.named_scope(scope, name), receive, watched)
            finally:
                if self._access_log:
                    _log_access(scope, watched.status, time.monotonic() - started)


def _log_access(scope: Scope, status: int, seconds: float) -> None:
    client = scope.get("client")
    log.info(
        "request",
        method=scope["method"],
        path=scope["path"],
        status=status,
        ms=round(seconds * 1000, 1),
        client=client[0] if client else "",
    )


class Admission:
    """Counts requests, and bounds how many with a body run at once.

    One runs once its body is there: clients that send theirs slowly, or never to its end, take no
    place of others. How many bodies are read is bounded by connections, and by their memory.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        in_flight: InFlight,
        max_in_flight: int,
        endpoints: Collection[str],
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._in_flight = in_flight
        self._max_in_flight = max_in_flight
        self._endpoints = endpoints
        metrics.watch(
            "gateway_in_flight_requests",
            "Requests for generations that are running",
            lambda: in_flight.mine,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = StatusWatch(send)
        try:
            if scope["method"] == "POST":
                await self._bounded(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            self._metrics.requests.labels(self._endpoint(scope), str(counted.status)).inc()

    async def _bounded(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._in_flight.all >= self._max_in_flight:
            refusal = errors.from_precast(self._full())
            refusal.headers["connection"] = "close"  # the body is not read
            await refusal.response(scope["path"])(scope, receive, send)
            return
        with ExitStack() as running_one:
            waits = True

            async def counting() -> Message:
                nonlocal waits
                message = await receive()
                if waits and not message.get("more_body", False):
                    waits = False
                    if self._in_flight.all >= self._max_in_flight:  # others were quicker
                        raise self._full()
                    running_one.enter_context(self._in_flight.one_more())
                return message

            await self._app(scope, counting, send)

    def _full(self) -> Overloaded:
        return Overloaded(f"{self._in_flight.all} requests are running already.")

    def _endpoint(self, scope: Scope) -> str:
        """The route's path, not the URL's: the number of label values is bounded."""
        route = getattr(scope.get("route"), "path", None)
        known = scope["path"] if scope["path"] in self._endpoints else "other"
        return str(route or known)
