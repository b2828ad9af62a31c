"""Several decode workers on one host, as forks of a process that has imported everything.

Starting Python, torch and gRPC takes a worker three seconds of processor time: eight that start at
once on two cores need 17 s. A fork needs none of it, shares the memory of what was imported, and a
replica that dies is back in less than a second. The parent only watches exits and heartbeats: it
starts no thread and serves nothing. What each replica does is ``main.run``, as for a worker alone.
"""

import gc
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from structlog.contextvars import bind_contextvars

from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError
from precast.log import get_logger
from precast.rpc.address import Address
from precast.system import alive
from precast.system.alive import Pulse
from precast.system.backoff import Backoff
from precast.system.process import ONE_THREAD, ForkedChild
from services.decode_worker.ranks.launcher import RankLauncher, nursery

if TYPE_CHECKING:
    from services.decode_worker.engine.sizing import Share

log = get_logger(__name__)

BACKOFF: Final = Backoff(first_s=0.1, max_s=5.0)
"""Before each restart of a replica in a row."""
SETTLED_S: Final = 30.0
"""A replica that ran this long starts again at the first wait."""
STOP_S: Final = 20.0
"""For all replicas to drain; what is left then is killed."""
_STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_WATCHED: Final = _STOP_SIGNALS | {signal.SIGCHLD}

Serve = Callable[[DecodeWorkerSettings, RankLauncher, "Share"], int]
"""Runs a decode worker until it is told to stop; returns its exit code."""


@dataclass(kw_only=True)
class _Replica:
    index: int
    settings: DecodeWorkerSettings
    share: "Share"
    process: ForkedChild | None = None
    pulse: Pulse | None = None
    """Of the process that runs."""
    started: float = 0.0
    failures: int = 0
    """In a row."""
    due: float = 0.0
    """When to start it again, if it doesn't run."""


def run(settings: DecodeWorkerSettings, serve: Serve) -> int:
    """Serves until SIGTERM or SIGINT. If a replica can't even start, all are stopped and its exit
    code is returned. Raises PrecastError for a model or settings that none could start with."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    os.environ.update(ONE_THREAD)  # ranks compute in threads of their own
    gc.disable()
    # imported here: numpy starts its threads as it is imported
    from services.decode_worker.model_files import open_model

    open_model(settings)  # forks have it; it says what is wrong before the rest is imported
    from services.decode_worker import main  # noqa: F401  # for the forks
    from services.decode_worker.engine.sizing import shares
    from services.decode_worker.ranks import nursery as ranks  # noqa: F401

    gc.freeze()  # or each fork's collector would walk, and copy, what was imported
    gc.enable()
    replicas = [
        _Replica(index=index, settings=replica(settings, index), share=share)
        for index, share in enumerate(shares(settings))
    ]

    def start(one: _Replica) -> None:
        def child() -> int:
            for number in _STOP_SIGNALS:  # until main.run handles them
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
            bind_contextvars(replica=one.index)  # into every line that it logs
            launcher = RankLauncher(forks=nursery())
            os.environ[alive.ENVIRONMENT] = str(pulse.child_end)
            try:
                return serve(one.settings, launcher, one.share)
            finally:
                launcher.close()

        pulse = Pulse()
        try:
            one.process = ForkedChild(child)
        except OSError:
            pulse.close()
            raise
        finally:
            pulse.started()
        one.started, one.pulse = time.monotonic(), pulse

    try:
        return _keep(replicas, start)
    finally:
        _stop(replicas)


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


def _keep(replicas: list[_Replica], start: Callable[[_Replica], None]) -> int:
    while True:
        for one in replicas:
            if one.process is None and one.due <= time.monotonic():
                try:
                    start(one)
                except OSError as error:  # no memory or no process to be had
                    _put_off(one, str(error))
            _end_if_hung(one)
            code = one.process.poll() if one.process is not None else None
            if code is None:
                continue
            if code > 0 and one.failures == 0 and time.monotonic() - one.started < SETTLED_S:
                return code  # it has never run: starting again would not help
            one.process = None
            if one.pulse is not None:
                one.pulse.close()
            _put_off(one, f"ended with {code}")
        waits = [one.due - time.monotonic() for one in replicas if one.process is None]
        info = signal.sigtimedwait(_WATCHED, max(0.0, min([alive.INTERVAL_S, *waits])))
        if info is not None and info.si_signo in _STOP_SIGNALS:
            return 0


def _end_if_hung(one: _Replica) -> None:
    if one.process is not None and one.pulse is not None and one.pulse.hung():
        log.error("replica has hung; killing it", replica=one.index, pid=one.process.pid)
        one.process.kill()
        one.process.wait()


def _put_off(one: _Replica, reason: str) -> None:
    now = time.monotonic()
    one.failures = 1 if now - one.started > SETTLED_S else one.failures + 1
    one.due = now + BACKOFF.wait_s(one.failures)
    log.warning("replica is started again", replica=one.index, reason=reason, failures=one.failures)


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
