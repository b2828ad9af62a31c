"""Several decode workers on one host, as forks of a process that has imported everything.

Starting Python, torch and gRPC takes a worker three seconds of processor time: eight that start at
once on two cores need 17 s. A fork needs none of it, shares the memory of what was imported, and a
replica that dies is back in less than a second. The parent only watches: it starts no thread and
serves nothing. What each replica does is ``main.run``, as for a worker alone.
"""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from structlog.contextvars import bind_contextvars

from precast.errors import ConfigError
from precast.log import get_logger
from precast.process import ForkedChild, available_cpus
from precast.settings import DecodeWorkerSettings
from services.decode_worker.rank_launch import RankLauncher

log = get_logger(__name__)

BACKOFF_S: Final = (0.1, 0.5, 1.0, 2.0, 5.0)
"""Wait before each restart of a replica in a row; the last one from then on."""
SETTLED_S: Final = 30.0
"""A replica that ran this long starts again at the first wait."""
STOP_S: Final = 20.0
"""For all replicas to drain; what is left then is killed."""
_STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_WATCHED: Final = _STOP_SIGNALS | {signal.SIGCHLD}
ONE_THREAD: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Libraries whose threads would be there when we fork. Ranks compute in threads of their own."""

Serve = Callable[[DecodeWorkerSettings, RankLauncher], int]
"""Runs a decode worker until it is told to stop; returns its exit code."""


@dataclass(kw_only=True)
class _Replica:
    index: int
    settings: DecodeWorkerSettings
    process: ForkedChild | None = None
    started: float = 0.0
    failures: int = 0
    """In a row."""
    due: float = 0.0
    """When to start it again, if it doesn't run."""


def run(settings: DecodeWorkerSettings, serve: Serve, refused: int) -> int:
    """Serves until SIGTERM or SIGINT. ``refused``: the exit code of a replica that refuses its
    settings; all are stopped then, and it is returned."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    for name in ONE_THREAD:
        os.environ[name] = "1"
    # imported here: numpy starts its threads as it is imported
    from services.decode_worker import rank
    from services.decode_worker.main import split_cores

    cores = split_cores(settings.cores or available_cpus(), settings.replicas)
    replicas = [
        _Replica(index=index, settings=replica(settings, index, own))
        for index, own in enumerate(cores)
    ]

    def start(one: _Replica) -> None:
        def child() -> int:
            for number in _STOP_SIGNALS:  # until main.run handles them
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            bind_contextvars(replica=one.index)  # into every line that it logs
            launcher = RankLauncher()
            launcher.fork_early(one.settings.tp, rank.run)
            try:
                return serve(one.settings, launcher)
            finally:
                launcher.close()

        one.process, one.started = ForkedChild(child), time.monotonic()

    try:
        return _keep(replicas, start, refused)
    finally:
        _stop(replicas)


def replica(
    settings: DecodeWorkerSettings, index: int, cores: tuple[int, ...]
) -> DecodeWorkerSettings:
    """The settings of one of several: its cores, and ports that follow the given ones. Raises
    ConfigError."""
    changed = {name: _shifted(name, getattr(settings, name), index) for name in _ADDRESSES}
    port = settings.metrics_port + index if settings.metrics_port else 0
    return settings.model_copy(update={**changed, "metrics_port": port, "cores": cores})


_ADDRESSES: Final = ("listen", "advertise")


def _shifted(name: str, address: str, by: int) -> str:
    host, _, port = address.rpartition(":")
    shifted = int(port) + by if int(port) else 0
    if shifted > 65535:
        raise ConfigError(f"{name} = {address!r}: replica {by} would have port {shifted}")
    return f"{host}:{shifted}"


def _keep(replicas: list[_Replica], start: Callable[[_Replica], None], refused: int) -> int:
    while True:
        now = time.monotonic()
        for one in replicas:
            if one.process is None and one.due <= now:
                start(one)
            elif one.process is not None and (code := one.process.poll()) is not None:
                if code == refused:
                    return code
                one.process = None
                one.failures = 1 if now - one.started > SETTLED_S else one.failures + 1
                one.due = now + BACKOFF_S[min(one.failures, len(BACKOFF_S)) - 1]
                log.warning("replica ended", replica=one.index, code=code, restarts=one.failures)
        waits = [one.due - time.monotonic() for one in replicas if one.process is None]
        info = signal.sigtimedwait(_WATCHED, max(0.0, min(waits, default=60.0)))
        if info is not None and info.si_signo in _STOP_SIGNALS:
            return 0


def _stop(replicas: list[_Replica]) -> None:
    processes = [one.process for one in replicas if one.process is not None]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + STOP_S
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        signal.sigtimedwait({signal.SIGCHLD}, 0.1)
    for process in processes:
        process.kill()
        process.wait()
