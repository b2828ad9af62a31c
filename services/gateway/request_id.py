"""A name for each HTTP request: the client's own ``x-request-id``, or one that is made here.

It goes out with the answer, into every line that is logged for the request, and to the decode
workers. With ``access_log`` there is a line for each request too.
"""

import re
import time
import uuid
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from precast.log import get_logger

log = get_logger(__name__)

HEADER: Final = "x-request-id"
_KEY: Final = "precast.request_id"
_GOOD: Final = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
"""What can go into logs and headers as it is; anything else is replaced."""
_NO_STATUS: Final = 499
"""Of a request whose client left before there was one."""


def request_id(scope: Scope) -> str:
    """Of the request of this scope; "" outside of ``RequestIds``."""
    return str(scope.get(_KEY, ""))


class RequestIds:
    """Names requests. The outermost of what a request passes, so that refusals have a name too."""

    def __init__(self, app: ASGIApp, *, access_log: bool = False) -> None:
        self._app = app
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _name(Headers(scope=scope).get(HEADER, ""))
        started, status = time.monotonic(), _NO_STATUS

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = name
            await send(message)

        with bound_contextvars(request_id=name):
            try:
                await self._app({**scope, _KEY: name}, receive, named)
            finally:
                if self._access_log:
                    _log(scope, status, time.monotonic() - started)


def _name(given: str) -> str:
    return given if _GOOD.fullmatch(given) else f"req-{uuid.uuid4().hex}"


def _log(scope: Scope, status: int, seconds: float) -> None:
    client = scope.get("client")
    log.info(
        "request",
        method=scope["method"],
        path=scope["path"],
        status=status,
        ms=round(seconds * 1000, 1),
        client=client[0] if client else "",
    )
