"""Reads the bodies of requests: within bounds of size, memory and time, unpacked if compressed."""

import asyncio
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from starlette.requests import Request

from services.gateway.openai import errors
from services.gateway.openai.errors import ApiError, invalid

_TIMEOUT_S: Final = 30.0
_BUFFERED_BODIES: Final = 16
"""What all bodies that are being read may take, in bodies of the largest size."""
_SMALL_BODY: Final = 16 << 10
"""Bytes that any body may take: who doesn't end large ones keeps no small ones out."""
_GZIP_WINDOW: Final = 31


class BodyReader:
    """Reads bodies of at most ``max_bytes``, packed and unpacked."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffered = 0

    async def read(self, request: Request) -> bytearray:
        """The whole body, unpacked.

        Raises ``ApiError``: 413 as soon as it is known to be too large, 408 if it is too slow, 415
        for an encoding that isn't known, 429 if other bodies take too much memory, 400 if it
        can't be unpacked; ``ClientDisconnect`` if the client leaves. What is left of the body then
        is the server's to throw away.
        """
        try:
            self._check_declared(request)
            async with asyncio.timeout(_TIMEOUT_S):
                return await self._read(request)
        except TimeoutError:
            raise _closing(_too_slow()) from None
        except ApiError as error:
            raise _closing(error) from None

    def _check_declared(self, request: Request) -> None:
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            raise _too_large(self._max_bytes)

    async def _read(self, request: Request) -> bytearray:
        unpacker = _unpacker(request)
        body, received = bytearray(), 0
        with self._held() as hold:
            async for chunk in request.stream():
                piece = unpacker.feed(chunk, self._max_bytes - len(body) + 1)
                hold(len(piece))
                body += piece
                received += len(chunk)
                if max(len(body), received) > self._max_bytes:
                    raise _too_large(self._max_bytes)
            unpacker.finish()
        return body

    @contextmanager
    def _held(self) -> Iterator[Callable[[int], None]]:
        """Counts what a body takes while it is read, but for what a small one has."""
        read = mine = 0

        def hold(size: int) -> None:
            nonlocal read, mine
            read += size
            more = max(0, read - _SMALL_BODY) - mine
            if more and self._buffered + more > _BUFFERED_BODIES * self._max_bytes:
                raise errors.overloaded("The bodies of other requests take too much memory.")
            mine += more
            self._buffered += more

        try:
            yield hold
        finally:
            self._buffered -= mine


class _Plain:
    def feed(self, chunk: bytes, limit: int) -> bytes:
        """At most ``limit`` bytes of what the chunk unpacks to."""
        return chunk

    def finish(self) -> None:
        """Raises ``ApiError`` if the body ended early."""


class _Gzip(_Plain):
    """One or more gzip members, as the format allows."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(_GZIP_WINDOW)

    def feed(self, chunk: bytes, limit: int) -> bytes:
        unpacked = b""
        while chunk and len(unpacked) < limit:
            if self._inflate.eof:
                self._inflate = zlib.decompressobj(_GZIP_WINDOW)
            try:
                unpacked += self._inflate.decompress(chunk, limit - len(unpacked))
            except zlib.error as error:
                raise invalid(f"The request body is not valid gzip: {error}.") from None
            chunk = self._inflate.unused_data
        return unpacked

    def finish(self) -> None:
        if not self._inflate.eof:
            raise invalid("The request body is not valid gzip: it ends early.")


def _unpacker(request: Request) -> _Plain:
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding in ("", "identity"):
        return _Plain()
    if encoding in ("gzip", "x-gzip"):
        return _Gzip()
    message = f"The content encoding {encoding!r} is not supported; it may be gzip."
    headers = {"accept-encoding": "gzip"}
    raise ApiError(415, message, code="unsupported_content_encoding", headers=headers)


def check_content_type(request: Request, *, required: bool) -> None:
    """Raises ``ApiError`` 415 for what isn't JSON.

    Pages of other sites can have a browser send bodies without a type, or of some types, but not
    ``application/json``. So a body without a type is JSON only if it is not ``required`` and no
    page sends it.
    """
    declared = request.headers.get("content-type")
    if declared is None:
        if not required and "origin" not in request.headers:
            return
        raise _not_json("The request has no content type")
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and "+json" in kind):
        raise _not_json(f"The content type {kind!r} is not supported")


def _not_json(what: str) -> ApiError:
    message = f"{what}; it must be application/json."
    return _closing(ApiError(415, message, code="unsupported_media_type"))


def _closing(error: ApiError) -> ApiError:
    """The body was not read to its end, so the connection can't be used again."""
    error.headers["connection"] = "close"
    return error


def _too_large(limit: int) -> ApiError:
    message = f"The request body is larger than {limit} bytes."
    return ApiError(413, message, code="request_too_large")


def _too_slow() -> ApiError:
    message = f"The request body took longer than {_TIMEOUT_S:g} s."
    return ApiError(408, message, code="request_timeout")
