"""Several gateways on one port, as forks of a process that has imported everything.

All accept from one listening socket, which the parent holds: a connection goes to who is free to
take it, and none is refused while a process is replaced. They agree on limits: of API keys through
Redis, of requests at once through memory that they share. Each has metrics of its own, at
``metrics_port`` and the ports behind it.
"""

from contextlib import ExitStack
from typing import Final

from structlog.contextvars import bind_contextvars

from precast import log as logs
from precast.config.settings import GatewaySettings
from precast.system.forked_group import importing, keep_forked

_MARGIN_S: Final = 10.0
"""For gateways to end once their requests have."""


def run(settings: GatewaySettings) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Raises ``ConfigError`` if an address can't be
    bound."""
    with importing():
        from services.gateway import main
        from services.gateway.in_flight import InFlight
    logs.configure("gateway", settings)
    main.check_certificate(settings)
    main.warn_if_open(settings)
    with ExitStack() as sockets:
        public = sockets.enter_context(main.bind("", settings.host, settings.port))
        private = [
            sockets.enter_context(main.bind("metrics_", settings.metrics_host, port))
            for port in settings.metrics_ports
        ]
        in_flight = InFlight(settings.workers)

        def serve(index: int) -> int:
            bind_contextvars(worker=index)  # into every line that it logs
            in_flight.begin(index)
            return main.serve(settings, [public, *private[index : index + 1]], in_flight)

        return keep_forked(
            settings.workers,
            serve,
            name="gateway",
            stop_s=settings.drain_timeout_s + _MARGIN_S,
        )
