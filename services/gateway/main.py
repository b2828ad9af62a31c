"""Running the gateway as a process."""

import asyncio
import contextlib
import gc
import math
import os
import resource
import signal
import socket
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from fastapi import FastAPI

from precast import log as logs
from precast.access.api_keys import KeyRing
from precast.config.settings import GatewaySettings
from precast.errors import ConfigError
from precast.log import get_logger
from precast.rpc.address import is_loopback
from precast.system.alive import keep_beating
from precast.system.wakeup import Wakeup
from services.gateway.app import create_app
from services.gateway.http.certificate import Certificate
from services.gateway.http.protocol import ConnectionLimits, limited
from services.gateway.http.secure_listener import HandshakeLimits, SecureListener
from services.gateway.in_flight import InFlight

log = get_logger(__name__)

_BACKLOG: Final = 1024
_HEADER_TIMEOUT_S: Final = 10.0
_KEEP_ALIVE_S: Final = 30
_OTHER_FILES: Final = 128
"""Files that are open for something else than connections."""


_FORCE_AFTER_S: Final = 1.0
"""A signal that follows the first one sooner is part of it: a whole tree of processes is told to
stop at once, in more than one way."""
_HANDSHAKE_TIMEOUT_S: Final = 10.0
"""Of TLS."""
_TICK_S: Final = 1.0
_LAST_WORDS_S: Final = 5
"""How long responses may take to end once their requests were ended."""


class _Server(uvicorn.Server):
    """uvicorn, without its habit of raising the signal again after a clean stop.

    It stops once: no new connections, then ``drain_s`` for what runs, then an error in OpenAI's
    shape for what still does. uvicorn itself would cancel it and answer with plain text.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        drain_s: float,
        certificate: Certificate | None,
        handshakes: int,
    ) -> None:
        """``handshakes``: that may be under way at each socket, where there is a certificate."""
        super().__init__(config)
        self._handshakes = handshakes
        self._certificate = certificate
        self._app = app
        self._drain_s = drain_s
        self._stopped_at: float | None = None
        self._stopping = Wakeup()
        self._ending: asyncio.Task[None] | None = None

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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with bounds for handshakes."""
        if self.config.ssl is None:
            await super().startup(sockets)
            return
        await super().startup(sockets=[])
        limits = HandshakeLimits(most=self._handshakes, timeout_s=_HANDSHAKE_TIMEOUT_S)
        for listener in sockets or ():
            server: Any = SecureListener(listener, self.config.ssl, self._protocol, limits)
            self.servers.append(server)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        protocol: asyncio.Protocol = make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return protocol

    async def main_loop(self) -> None:
        """Ticks, which keep the date of answers, once a second; uvicorn's own are ten."""
        while not await self.on_tick(0):
            if self._certificate is not None and self.config.ssl is not None:
                self._certificate.renew(self.config.ssl)
            await self._stopping.wait(_TICK_S)

    def _stop(self) -> None:
        """The first signal lets requests finish; a second one, a second later, ends them."""
        now = asyncio.get_running_loop().time()
        if self._stopped_at is None:
            self._stopped_at = now
            self.should_exit = True
            self._stopping.set()
            self._end_requests_in(self._drain_s)
        elif now - self._stopped_at >= _FORCE_AFTER_S:
            self._end_requests_in(0.0)

    def _end_requests_in(self, delay_s: float) -> None:
        async def end() -> None:
            await asyncio.sleep(delay_s)
            await self._app.state.end_requests()

        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.create_task(end(), name="end requests")


def run(settings: GatewaySettings) -> int:
    """Serve until SIGINT or SIGTERM; running requests get ``drain_timeout_s`` to finish.

    Returns the exit code. Raises ``ConfigError`` if an address can't be bound.
    """
    logs.configure("gateway", settings)
    check_certificate(settings)
    with contextlib.ExitStack() as open_sockets:
        listeners = [open_sockets.enter_context(one) for one in _listeners(settings)]
        warn_if_open(settings)
        return serve(settings, listeners, InFlight())


def serve(settings: GatewaySettings, listeners: list[socket.socket], in_flight: InFlight) -> int:
    """As ``run``, on the public socket and, if there is to be one, the private one."""
    # The cores belong to the decode workers' ranks: a long prompt may have one, not all of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app = create_app(settings, _private_port(listeners), in_flight)
    connections = _connections(settings)
    config = _config(app, settings, connections)
    gc.freeze()  # a full collection would walk all of this: 0.1 s in which no token goes out
    certificate, handshakes = _certificate(settings), max(1, connections // 2)
    server = _Server(config, app, settings.drain_timeout_s, certificate, handshakes)
    log.info("gateway listening", host=settings.host, port=listeners[0].getsockname()[1])
    server.run(sockets=listeners)
    log.info("gateway stopped")
    return 0 if server.started else 1


def warn_if_open(settings: GatewaySettings) -> None:
    """If there should be API keys and are none."""
    if KeyRing(folder=settings.api_keys_dir).open and not is_loopback(settings.host):
        log.warning(
            "whoever reaches this port may use it: there are no API keys",
            host=settings.host,
            next="precast keys api create NAME",
        )


def _listeners(settings: GatewaySettings) -> list[socket.socket]:
    """The public socket, then the private one if there is to be one."""
    public = bind("", settings.host, settings.port)
    if not settings.metrics_port:
        return [public]
    return [public, bind("metrics_", settings.metrics_host, settings.metrics_port)]


def _private_port(listeners: list[socket.socket]) -> int | None:
    return listeners[1].getsockname()[1] if len(listeners) > 1 else None


def _connections(settings: GatewaySettings) -> int:
    """How many there may be; with a certificate, as many more may shake hands."""
    each = 1 if settings.https_certificate is None else 2
    return max(1, _allow_files(settings.max_connections * each) // each)


def _config(app: FastAPI, settings: GatewaySettings, connections: int) -> uvicorn.Config:
    limits = ConnectionLimits(connections=connections, header_timeout_s=_HEADER_TIMEOUT_S)
    return uvicorn.Config(
        app,
        http=limited(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s) + _LAST_WORDS_S,
        timeout_keep_alive=_KEEP_ALIVE_S,
        ssl_certfile=settings.https_certificate,
        ssl_keyfile=settings.https_key,
    )


def check_certificate(settings: GatewaySettings) -> None:
    """Raises ``ConfigError``, where the server would end with a traceback."""
    if (certificate := _certificate(settings)) is not None:
        certificate.check()


def _certificate(settings: GatewaySettings) -> Certificate | None:
    if settings.https_certificate is None:
        return None
    return Certificate(settings.https_certificate, settings.https_key)


def _allow_files(connections: int) -> int:
    """Raise the limit of open files for so many connections; how many there may be after it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(1, min(connections, wanted - _OTHER_FILES))


def bind(prefix: str, host: str, port: int) -> socket.socket:
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
