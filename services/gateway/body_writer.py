"""Pieces of an answer sent where they come in, past ASGI's ``send``.

A token's way through the ``send`` of every middleware costs more than what it says. So the server
puts a writer into a request's scope, for answers that have begun. It writes only what is written at
once: where a client reads too slowly, or the answer has no chunks, ``send`` is the way.
"""

from typing import Final

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_EXTENSION: Final = "precast.body_writer"
_SMALL: Final = 1024
_BEGUN: Final = tuple(b"%x\r\n" % size for size in range(_SMALL))
"""What small chunks begin with, by their size."""


class BodyWriter:
    """Of one request."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def is_open(self) -> bool:
        """Whether the answer's headers are sent, and a piece can be sent behind them now."""
        return self.write(b"")

    def write(self, piece: bytes) -> bool:
        """Sends it, if it is not empty. False, with nothing sent, where it is not open."""
        cycle = self._cycle
        if not cycle.chunked_encoding or cycle.response_complete or cycle.flow.write_paused:
            return False
        if cycle.disconnected:
            return False
        if piece:
            size = len(piece)
            begun = _BEGUN[size] if size < _SMALL else b"%x\r\n" % size
            cycle.transport.write(begun + piece + b"\r\n")
        return True


def offer(cycle: RequestResponseCycle) -> None:
    """Lets the application find the request's writer."""
    scope: Scope = cycle.scope  # type: ignore[assignment]
    scope["extensions"] = {**scope.get("extensions", {}), _EXTENSION: BodyWriter(cycle)}


def writer_of(scope: Scope) -> BodyWriter | None:
    """None of another server."""
    writer: BodyWriter | None = scope.get("extensions", {}).get(_EXTENSION)
    return writer
