"""Which function answers which path.

Plain routes of Starlette: what FastAPI's own do for each request, of dependencies and models that
nobody here has, takes a third of a millisecond.
"""

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import Scope

Endpoint = Callable[[Request], Awaitable[Response] | Response]


class Paths:
    """Endpoints of one area, under a common prefix."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self.routes: list[Route] = []

    def get(self, path: str) -> Callable[[Endpoint], Endpoint]:
        return self.on(path, "GET")

    def post(self, path: str) -> Callable[[Endpoint], Endpoint]:
        return self.on(path, "POST")

    def on(self, path: str, *methods: str) -> Callable[[Endpoint], Endpoint]:
        """Several methods are one route's: for its ``Allow`` header."""

        def add(endpoint: Endpoint) -> Endpoint:
            self.routes.append(_Route(self._prefix + path, endpoint, methods=methods))
            return endpoint

        return add


class _Route(Route):
    """Says in the scope which it is; HEAD is allowed only where it was asked for."""

    def __init__(self, path: str, endpoint: Endpoint, *, methods: tuple[str, ...]) -> None:
        super().__init__(path, endpoint, methods=methods)
        self.methods = set(methods)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, found = super().matches(scope)
        return match, {**found, "route": self} if found else found
