"""Running the gateway as a process."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn

from precast import log as logs
from precast.config.settings import GatewaySettings
from precast.errors import ConfigError
from precast.log import get_logger
from precast.system.alive import keep_beating
from services.gateway.app import create_app
from services.gateway.http.protocol import ConnectionLimits, limited

log = get_logger(__name__)

_BACKLOG: Final = 1024
_HEADER_TIMEOUT_S: Final = 10.0
_KEEP_ALIVE_S: Final = 30
_OTHER_FILES: Final = 128
"""Files that are open for something else than connections."""


class _Server(uvicorn.Server):
    """uvicorn, without its habit of raising the signal again after a clean stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signum, self._stop)
        beating = loop.create_task(keep_beating(), name="beating")
        try:
            yield
        finally:
            beating.cancel()
            for signum in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(signum)

    def _stop(self) -> None:
        """The first signal lets requests finish; the second doesn't."""
        self.force_exit = self.should_exit
        self.should_exit = True


def run(settings: GatewaySettings) -> int:
    """Serve until SIGINT or SIGTERM; running requests get ``drain_timeout_s`` to finish.

    Returns the exit code. Raises ``ConfigError`` if an address can't be bound.
    """
    logs.configure("gateway", settings)
    # The cores belong to the decode workers' ranks: a long prompt may have one, not all of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.ExitStack() as open_sockets:
        listeners = [open_sockets.enter_context(one) for one in _listeners(settings)]
        server = _Server(_config(settings, listeners))
        log.info("gateway listening", host=settings.host, port=listeners[0].getsockname()[1])
        server.run(sockets=listeners)
    log.info("gateway stopped")
    return 0 if server.started else 1


def _listeners(settings: GatewaySettings) -> list[socket.socket]:
    """The public socket, then the private one if there is to be one."""
    if settings.metrics_port and settings.metrics_port == settings.port:
        raise ConfigError(f"metrics_port = {settings.metrics_port}: the same as port")
    public = _bind("", settings.host, settings.port)
    if not settings.metrics_port:
        return [public]
    return [public, _bind("metrics_", settings.metrics_host, settings.metrics_port)]


def _config(settings: GatewaySettings, listeners: list[socket.socket]) -> uvicorn.Config:
    private_port = listeners[1].getsockname()[1] if len(listeners) > 1 else None
    connections = _allow_files(settings.max_connections)
    limits = ConnectionLimits(connections=connections, header_timeout_s=_HEADER_TIMEOUT_S)
    return uvicorn.Config(
        create_app(settings, private_port),
        http=limited(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(max(1, settings.drain_timeout_s)),
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


def _allow_files(connections: int) -> int:
    """Raise the limit of open files for so many connections; how many there may be after it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, min(connections, wanted - _OTHER_FILES))


def _bind(prefix: str, host: str, port: int) -> socket.socket:
    """A listening socket; an IPv6 address may stand in brackets.

    Raises ``ConfigError`` with the reason. ``prefix`` is that of the settings' names.
    """
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            bare, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{prefix}host {host!r}: {error.strerror}") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = f"{prefix}host {host!r}, {prefix}port {port}: {error.strerror}"
        raise ConfigError(reason) from None
    return listener
