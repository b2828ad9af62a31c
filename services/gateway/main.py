"""Running the gateway as a process."""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn

from precast import log as logs
from precast.config.settings import GatewaySettings
from precast.errors import ConfigError
from precast.log import get_logger
from services.gateway.app import create_app

log = get_logger(__name__)

_BACKLOG: Final = 1024


class _Server(uvicorn.Server):
    """uvicorn, without its habit of raising the signal again after a clean stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._stop)
        try:
            yield
        finally:
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)

    def _stop(self) -> None:
        """The first signal lets requests finish; the second doesn't."""
        self.force_exit = self.should_exit
        self.should_exit = True


def run(settings: GatewaySettings) -> int:
    """Serve until SIGINT or SIGTERM; running requests get ``drain_timeout_s`` to finish.

    Returns the exit code. Raises ``ConfigError`` if the address can't be bound.
    """
    logs.configure("gateway", settings)
    # The cores belong to the decode workers' ranks: a long prompt may have one, not all of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    listener = _bind(settings.host, settings.port)
    config = uvicorn.Config(
        create_app(settings),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(max(1, settings.drain_timeout_s)),
        timeout_keep_alive=30,
    )
    server = _Server(config)
    log.info("gateway listening", host=settings.host, port=listener.getsockname()[1])
    with listener:
        server.run(sockets=[listener])
    log.info("gateway stopped")
    return 0 if server.started else 1


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ``ConfigError`` with the reason."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"host {host!r}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"host {host!r}, port {port}: {error.strerror}") from None
    return listener
