"""Keeps child processes running: restarts those that end, and stops them all within a deadline."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from precast.cli.failures import EXIT_USAGE
from precast.errors import ConfigError
from precast.system.backoff import Backoff
from precast.system.process import bound_to_parent

BACKOFF: Final = Backoff(first_s=0.2, max_s=5.0)
"""Before each restart in a row."""
SETTLED_S: Final = 30.0
"""A child that ran this long starts again at the first wait."""
_LOG_TAIL_BYTES: Final = 4096
_LOG_BYTES: Final = 32 << 20
"""A log that is larger when its child starts is put aside as ``.1``."""


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """A child process to keep running."""

    name: str
    command: Sequence[str]
    log_path: Path


@dataclass(kw_only=True)
class Child:
    """A child and its present process."""

    spec: ChildSpec
    pid: int | None = None
    """None while it does not run."""
    restarts: int = 0
    last_exit: str = ""
    """Why it ended the last time."""
    started: float = field(default_factory=time.monotonic)


class Supervisor:
    """Runs children until stopped. Use it from the main thread: children die with their thread."""

    def __init__(self, specs: Sequence[ChildSpec]) -> None:
        self.children = [Child(spec=spec) for spec in specs]
        self._keepers: list[asyncio.Task[None]] = []

    def start(self, names: Sequence[str]) -> None:
        """Start these children, in order, and keep them running."""
        for child in self.children:
            if child.spec.name in names:
                self._keepers.append(asyncio.create_task(_keep(child), name=child.spec.name))

    def check(self) -> None:
        """Raises ``ConfigError`` if a child refuses its settings: a restart would not help."""
        for keeper in self._keepers:
            if keeper.done() and not keeper.cancelled() and (error := keeper.exception()):
                raise error

    async def stop(self, grace_s: float) -> None:
        """Stop all children, those started last first, and kill what is left after ``grace_s``.

        All have ended when this returns.
        """
        end = time.monotonic() + grace_s
        for keeper in reversed(self._keepers):
            keeper.cancel()
            await asyncio.wait([keeper], timeout=max(0.0, end - time.monotonic()))
        self.kill()
        await asyncio.gather(*self._keepers, return_exceptions=True)

    def kill(self) -> None:
        """Kill every child now."""
        for child in self.children:
            if child.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)


async def _keep(child: Child) -> None:
    attempt = 0
    while True:
        process = await _spawn(child)
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _terminate(process)
            raise
        finally:
            child.pid = None
        child.last_exit = _reason(code)
        if code == EXIT_USAGE:
            raise ConfigError(f"{child.spec.name}: {last_line(child.spec.log_path)}")
        settled = time.monotonic() - child.started > SETTLED_S
        attempt = 0 if settled else attempt + 1
        await asyncio.sleep(BACKOFF.wait_s(max(attempt, 1)))
        child.restarts += 1


async def _spawn(child: Child) -> asyncio.subprocess.Process:
    path = child.spec.log_path
    if path.exists() and path.stat().st_size > _LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *bound_to_parent(list(child.spec.command)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C goes to us alone: we stop them in order
        )
    child.pid, child.started = process.pid, time.monotonic()
    return process


async def _terminate(process: asyncio.subprocess.Process) -> None:
    """Ask it to end and wait; whoever stops us kills it when its time is over."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    await process.wait()


def last_line(log_path: Path) -> str:
    """The last line that a child has logged, without a ``precast:`` in front."""
    with log_path.open("rb") as log:
        log.seek(max(0, log_path.stat().st_size - _LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return (lines or ["ended without a word"])[-1].removeprefix("precast: ")


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
