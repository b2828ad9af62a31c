"""The process that ``serve`` forks its services from, kept running beside them."""

import asyncio
import signal
import time
from collections.abc import Sequence
from typing import Final

from precast.log import get_logger
from precast.system.backoff import Backoff
from precast.system.fork_server import ForkServer, Order
from precast.system.process import Child

log = get_logger(__name__)

PROGRAM: Final = "precast.cli.fork_program"
SERVICES: Final = ("gateway", "decode-worker")
"""Those that have to be back at once."""
PING_S: Final = 2.0
BACKOFF: Final = Backoff(first_s=1.0, max_s=30.0)
_SETTLED_S: Final = 60.0


class Forks:
    """Forks services, and starts the server again when it ends or hangs."""

    def __init__(self) -> None:
        self._server = ForkServer.start(PROGRAM)
        self._keeper = asyncio.create_task(self._keep(), name="fork server")

    async def spawn(
        self, command_line: Sequence[str], arguments: Sequence[str], log_fd: int, alive_fd: int
    ) -> Child:
        """A service of ours. Raises ``OSError`` if there is no server now."""
        order = Order(
            command_line=command_line,
            arguments=arguments,
            death_signal=signal.SIGTERM,
            log=True,
            alive=True,
        )
        return await asyncio.to_thread(self._server.spawn, order, [log_fd, alive_fd])

    async def close(self) -> None:
        self._keeper.cancel()
        await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.to_thread(self._server.close)

    async def _keep(self) -> None:
        failures, started = 0, time.monotonic()
        while True:
            try:
                await asyncio.to_thread(self._server.ping)
            except OSError as error:
                log.warning("fork server is started again", reason=str(error))
                await asyncio.to_thread(self._server.close)
                failures = 0 if time.monotonic() - started > _SETTLED_S else failures + 1
                await asyncio.sleep(BACKOFF.wait_s(failures))
                # not in a thread: with it the server would end
                self._server, started = ForkServer.start(PROGRAM), time.monotonic()
            await asyncio.sleep(PING_S)
