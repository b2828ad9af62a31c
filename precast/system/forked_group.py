"""Forks of one process that are kept running: those that end or hang are replaced.

A fork needs no imports and shares their memory, so one that dies is back within a second. The
parent only watches exits and heartbeats: it starts no thread and serves nothing.
"""

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from precast.log import get_logger
from precast.system import alive
from precast.system.alive import Pulse
from precast.system.backoff import Backoff
from precast.system.process import ForkedChild

log = get_logger(__name__)

BACKOFF: Final = Backoff(first_s=0.1, max_s=5.0)
"""Before each restart of a fork in a row."""
SETTLED_S: Final = 30.0
"""A fork that ran this long starts again at the first wait."""
_STOP_SIGNALS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_WATCHED: Final = _STOP_SIGNALS | {signal.SIGCHLD}

Main = Callable[[int], int]
"""What a fork of this number does until it is told to stop; returns its exit code."""


@dataclass(kw_only=True)
class _Member:
    index: int
    process: ForkedChild | None = None
    pulse: Pulse | None = None
    """Of the process that runs."""
    started: float = 0.0
    failures: int = 0
    """In a row."""
    due: float = 0.0
    """When to start it again, if it doesn't run."""


@contextmanager
def importing() -> Iterator[None]:
    """Around the imports that forks share. Signals wait from here on until ``keep_forked``."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    gc.disable()
    try:
        yield
        gc.freeze()  # or each fork's collector would walk, and copy, what was imported
    finally:
        gc.enable()


def keep_forked(count: int, main: Main, *, name: str, stop_s: float) -> int:
    """Keeps ``count`` forks running until SIGTERM or SIGINT; gives the exit code.

    If one can't even start, all are stopped and its exit code is returned. ``name``: of a fork, for
    the log. ``stop_s``: for all to end; what is left then is killed.
    """
    pipe = alive.descriptor()
    members = [_Member(index=index) for index in range(count)]
    try:
        while True:
            alive.beat(pipe)
            for one in members:
                if (code := _look(one, main, name)) is not None:
                    return code
            if _next_signal(members) in _STOP_SIGNALS:
                return 0
    finally:
        _stop([one.process for one in members if one.process is not None], stop_s, pipe)


def _look(one: _Member, main: Main, name: str) -> int | None:
    """Starts it if it is due. Its exit code if starting it again would not help."""
    if one.process is None and one.due <= time.monotonic():
        try:
            _start(one, main)
        except OSError as error:  # no memory or no process to be had
            _put_off(one, name, str(error))
    _end_if_hung(one, name)
    code = one.process.poll() if one.process is not None else None
    if code is None:
        return None
    if code > 0 and one.failures == 0 and time.monotonic() - one.started < SETTLED_S:
        return code  # it has never run
    one.process = None
    if one.pulse is not None:
        one.pulse.close()
    _put_off(one, name, f"ended with {code}")
    return None


def _start(one: _Member, main: Main) -> None:
    def child() -> int:
        for number in _STOP_SIGNALS:  # until main handles them
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
        os.environ[alive.ENVIRONMENT] = str(pulse.child_end)
        return main(one.index)

    pulse = Pulse()
    try:
        one.process = ForkedChild(child)
    except OSError:
        pulse.close()
        raise
    finally:
        pulse.started()
    one.started, one.pulse = time.monotonic(), pulse


def _end_if_hung(one: _Member, name: str) -> None:
    if one.process is not None and one.pulse is not None and one.pulse.hung():
        log.error(f"{name} has hung; killing it", number=one.index, pid=one.process.pid)
        one.process.kill()
        one.process.wait()


def _put_off(one: _Member, name: str, reason: str) -> None:
    now = time.monotonic()
    one.failures = 1 if now - one.started > SETTLED_S else one.failures + 1
    one.due = now + BACKOFF.wait_s(one.failures)
    log.warning(f"{name} is started again", number=one.index, reason=reason, failures=one.failures)


def _next_signal(members: Sequence[_Member]) -> int:
    """The next one, or 0 when it is time to look again."""
    waits = [one.due - time.monotonic() for one in members if one.process is None]
    info = signal.sigtimedwait(_WATCHED, max(0.0, min([alive.INTERVAL_S, *waits])))
    return info.si_signo if info is not None else 0


def _stop(processes: Sequence[ForkedChild], stop_s: float, pipe: int | None) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + stop_s
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        alive.beat(pipe)
        info = signal.sigtimedwait(_WATCHED, 0.1)
        if info is not None and info.si_signo in _STOP_SIGNALS:  # asked again
            for process in processes:
                process.send_signal(signal.SIGTERM)
    for process in processes:
        process.kill()
        process.wait()
