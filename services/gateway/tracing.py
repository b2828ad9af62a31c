"""A span for each HTTP request, where traces are wanted; what workers do for it is within."""

from collections.abc import Collection
from typing import Final

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from precast.telemetry import Span, Tracer
from services.gateway.request_id import request_id
from services.gateway.status_watch import StatusWatch

_KEY: Final = "precast.span"


def span_of(scope: Scope) -> Span | None:
    """Of the request of this scope; None where it is not traced."""
    return scope.get(_KEY)


class Traces:
    """Its spans have the client's as parent, where that sends a ``traceparent``."""

    def __init__(
        self, app: ASGIApp, *, tracer: Tracer, endpoints: Collection[str], free: Collection[str]
    ) -> None:
        """``endpoints``: paths that name spans; others are too many. ``free``: not traced."""
        self._app = app
        self._tracer = tracer
        self._endpoints = frozenset(endpoints)
        self._free = frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free:
            await self._app(scope, receive, send)
            return
        span = self._begin(scope)
        watched = StatusWatch(send)
        try:
            await self._app({**scope, _KEY: span}, receive, watched)
        finally:
            span.set({"http.response.status_code": watched.status})
            span.end(f"status {watched.status}" if watched.status >= 500 else "")

    def _begin(self, scope: Scope) -> Span:
        path, method = scope["path"], scope["method"]
        known = path in self._endpoints
        return self._tracer.begin(
            f"{method} {path}" if known else method,
            parent=Headers(scope=scope).get("traceparent", ""),
            attributes={
                "http.request.method": method,
                "url.path": path,
                **({"http.route": path} if known else {}),
                "precast.request_id": request_id(scope),
            },
        )
