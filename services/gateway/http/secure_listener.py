"""Accepts TLS connections: with a deadline for each handshake, and a bound on how many there are.

A loop's own server can do the first only. So whoever opened more connections than there may be open
files, and never said a word, kept all others out.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from precast.log import get_logger
from services.gateway.http.refusal import refusal

log = get_logger(__name__)

_OUT_OF_FILES_S: Final = 0.1
_REQUEST_BYTES: Final = 64 << 10


@dataclass(frozen=True, kw_only=True)
class HandshakeLimits:
    most: int
    """One more ends the oldest."""
    timeout_s: float


class SecureListener:
    """One listening socket. To uvicorn it is a server that can be closed."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        protocol: Callable[[], asyncio.Protocol],
        limits: HandshakeLimits,
    ) -> None:
        """Accepts from now on. ``protocol``: of a connection whose hands are shaken."""
        self._listener = listener
        self._context = context
        self._protocol = protocol
        self._limits = limits
        self._begun: dict[socket.socket, asyncio.Task[None]] = {}
        """The oldest first."""
        listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept(), name="accept")

    def close(self) -> None:
        self._accepting.cancel()
        for task in self._begun.values():
            task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._accepting, *self._begun.values(), return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # the client has gone, or there are too many open files
                log.debug("connection not accepted", reason=error.strerror)
                await asyncio.sleep(_OUT_OF_FILES_S)
            else:
                self._begin(accepted)
                await asyncio.sleep(0)  # what is accepted at once doesn't let others run

    def _begin(self, accepted: socket.socket) -> None:
        if len(self._begun) >= self._limits.most:
            with contextlib.suppress(OSError):
                next(iter(self._begun)).shutdown(socket.SHUT_RDWR)
        self._begun[accepted] = asyncio.create_task(self._shake_hands(accepted))

    async def _shake_hands(self, accepted: socket.socket) -> None:
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if await self._is_plain(accepted):
                _refuse(accepted)
                return
            await asyncio.get_running_loop().connect_accepted_socket(
                self._protocol,
                accepted,
                ssl=self._context,
                ssl_handshake_timeout=self._limits.timeout_s,
            )
        except OSError as error:  # ssl's errors and time-outs too
            log.debug("no handshake", reason=str(error))
            accepted.close()
        finally:
            self._begun.pop(accepted, None)

    async def _is_plain(self, accepted: socket.socket) -> bool:
        """Whether it begins with a letter, as HTTP does. Raises ``TimeoutError``."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(accepted, readable.set)
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                await readable.wait()
        finally:
            loop.remove_reader(accepted)
        return accepted.recv(1, socket.MSG_PEEK).isalpha()


def _refuse(accepted: socket.socket) -> None:
    """Raises ``OSError``."""
    with accepted:
        accepted.recv(_REQUEST_BYTES)  # or the answer would be lost with it
        accepted.send(refusal(400, "This is HTTPS: the URL has to begin with https://."))
        accepted.shutdown(socket.SHUT_WR)
