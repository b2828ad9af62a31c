"""Several decode workers on one host, as forks of a process that has imported everything.

Starting Python, torch and gRPC takes a worker three seconds of processor time: eight that start at
once on two cores need 17 s. A fork needs none of it (``precast.system.forked_group``). What each
replica does is ``main.run``, as for a worker alone.
"""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from structlog.contextvars import bind_contextvars

from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError
from precast.rpc.address import Address
from precast.system.forked_group import importing, keep_forked
from precast.system.process import ONE_THREAD
from services.decode_worker.ranks.launcher import RankLauncher, nursery

if TYPE_CHECKING:
    from services.decode_worker.engine.sizing import Share

STOP_S: Final = 20.0
"""For all replicas to drain; what is left then is killed."""

Serve = Callable[[DecodeWorkerSettings, RankLauncher, "Share"], int]
"""Runs a decode worker until it is told to stop; returns its exit code."""


def run(settings: DecodeWorkerSettings, serve: Serve) -> int:
    """Serves until SIGTERM or SIGINT. If a replica can't even start, all are stopped and its exit
    code is returned. Raises PrecastError for a model or settings that none could start with."""
    os.environ.update(ONE_THREAD)  # ranks compute in threads of their own
    with importing():
        # imported here: numpy starts its threads as it is imported
        from services.decode_worker.model_files import open_model

        open_model(settings)  # forks have it; it says what is wrong before the rest is imported
        from services.decode_worker import main  # noqa: F401  # for the forks
        from services.decode_worker.engine.sizing import shares
        from services.decode_worker.ranks import nursery as ranks  # noqa: F401
    replicas = [(replica(settings, index), share) for index, share in enumerate(shares(settings))]

    def serve_one(index: int) -> int:
        bind_contextvars(replica=index)  # into every line that it logs
        own, share = replicas[index]
        launcher = RankLauncher(forks=nursery())
        try:
            return serve(own, launcher, share)
        finally:
            launcher.close()

    return keep_forked(len(replicas), serve_one, name="replica", stop_s=STOP_S)


def replica(settings: DecodeWorkerSettings, index: int) -> DecodeWorkerSettings:
    """The settings of one of several: its ports follow the given ones. Raises ConfigError."""

    def port(name: str, given: int) -> int:
        """Higher by the replica's number; 0 stays: the system chooses, or none."""
        own = given + index if given else 0
        if own > 65535:
            raise ConfigError(f"{name}: replica {index} would have port {own}")
        return own

    def address(name: str, given: str) -> str:
        own = Address.parse(given)
        return str(own.at(port(name, own.port)))

    own = {
        "listen": address("listen", settings.listen),
        "advertise": address("advertise", settings.advertise),
        "metrics_port": port("metrics_port", settings.metrics_port),
    }
    return settings.model_copy(update=own)
