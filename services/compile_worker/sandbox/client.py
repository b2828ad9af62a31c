"""The compile worker's side of the fork server: starts it, orders captures, replaces it."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from precast.errors import CaptureFailed
from precast.system.background import remove_idle_cgroups
from services.compile_worker.sandbox import server as fork_server
from services.compile_worker.sandbox.server import ENVIRONMENT, IDLE, MAX_ORDER_BYTES, Order

_STOP_S: Final = 10.0


class ServerEnded(CaptureFailed):
    """The fork server died, and the capture with it."""


class Capture:
    """A capture that was ordered."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._over = False

    async def message(self) -> dict[str, str | int]:
        """What comes next: "pid", then any number of "stage", at the end "exit".

        Raises ServerEnded.
        """
        while not self._over:
            try:
                line = await self._reader.readline()
            except ValueError:  # longer than the reader's buffer: a compiler's output
                continue
            if not line:
                self._over = True
                break
            with suppress(msgspec.DecodeError):
                message = msgspec.json.decode(line, type=dict[str, str | int])
                self._over = "exit" in message
                return message
        raise ServerEnded("the capture server has ended")

    async def end(self) -> None:
        """Kill what is left of it. Returns when nothing is."""
        with suppress(OSError):
            self._writer.write_eof()
        with suppress(TimeoutError, ServerEnded):
            async with asyncio.timeout(_STOP_S):
                while True:
                    await self.message()
        self._writer.close()


class ForkServer:
    """Started with the first capture, and again when it has died."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, idle: bool = True, cpus: Sequence[int] = ()
    ) -> None:
        """``module`` with ``arguments`` captures (see ``sandbox.server``). ``idle``: it gets only
        what others leave. ``cpus`` are the CPUs on which it may run, none: wherever this process
        may."""
        self._program = (IDLE if idle else "", ",".join(map(str, cpus)), module, *arguments)
        self._process: asyncio.subprocess.Process | None = None
        self._orders: socket.socket | None = None
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The server's; None if it doesn't run."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process and running else None

    @asynccontextmanager
    async def capture(self, factors: dict[str, str], folder: Path) -> AsyncIterator[Capture]:
        """Order a capture into ``folder``. At the end all of its processes are dead.

        Raises ``CaptureFailed`` if there is no server.
        """
        order = Order(factors=msgspec.json.encode(factors).decode(), folder=folder).to_bytes()
        if len(order) > MAX_ORDER_BYTES:
            raise CaptureFailed("factors are too long")
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                await self._send(order, theirs)
            except BaseException:
                ours.close()
                raise
        capture = Capture(*await asyncio.open_unix_connection(sock=ours))
        try:
            yield capture
        finally:
            # shielded: a second cancellation must not leave a process
            await asyncio.shield(capture.end())

    async def stop(self) -> None:
        """End the server and all captures."""
        async with self._starting:
            await self._stop()

    async def _stop(self) -> None:
        if self._orders:
            self._orders.close()
            self._orders = None
        if self._process:
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
            self._process = None
            remove_idle_cgroups()

    async def _send(self, order: bytes, theirs: socket.socket) -> None:
        async with self._starting:
            if self._orders and self._try_to_send(order, theirs):
                return
            await self._stop()
            await self._start()
            if not self._try_to_send(order, theirs):
                raise CaptureFailed("the capture server can't be started")

    def _try_to_send(self, order: bytes, theirs: socket.socket) -> bool:
        assert self._orders
        try:
            socket.send_fds(self._orders, [order], [theirs.fileno()])
        except OSError:
            return False
        return True

    async def _start(self) -> None:
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", fork_server.__name__),
                *(str(theirs.fileno()), str(os.getpid()), *self._program),
                stdin=asyncio.subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
