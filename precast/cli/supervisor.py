"""Keeps child processes running: restarts those that end or hang, and stops them all within a
deadline.

Services are forks of one process that has imported what they need, so that they are back at once;
where that can't be had, they are started afresh.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from precast.cli.failures import EXIT_USAGE
from precast.cli.forks import Forks
from precast.cli.logs import keep_logs, last_line
from precast.errors import ConfigError
from precast.log import get_logger
from precast.system import alive
from precast.system.alive import Pulse
from precast.system.backoff import Backoff
from precast.system.process import Child as ChildProcess
from precast.system.process import bound_to_parent

log = get_logger(__name__)

BACKOFF: Final = Backoff(first_s=0.2, max_s=5.0)
"""Before each restart but the first in a row, which is at once."""
SETTLED_S: Final = 30.0
"""A child that ran this long starts again at the first wait."""
PROBE_S: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """A child process to keep running."""

    name: str
    command: Sequence[str]
    log_path: Path
    fork: Sequence[str] = ()
    """Arguments of ``precast`` that do the same in a fork of a process that has imported it."""
    beats: bool = False
    """Whether it says once a second that it is alive (``precast.system.alive``)."""
    probe: Callable[[], bool] | None = None
    """Asks whether it answers, in a thread and within ``PROBE_S``."""


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
    hung: bool = False
    """Whether it was killed because it had hung."""


class Supervisor:
    """Runs children until stopped. Use it from the main thread: children die with their thread."""

    def __init__(self, specs: Sequence[ChildSpec], forks: Forks | None = None) -> None:
        self.children = [Child(spec=spec) for spec in specs]
        self._forks = forks
        self._keepers: list[asyncio.Task[None]] = []
        self._logs = asyncio.create_task(keep_logs(self._log_paths))

    def start(self, names: Sequence[str]) -> None:
        """Start these children, in order, and keep them running."""
        for child in self.children:
            if child.spec.name in names:
                keeper = asyncio.create_task(_keep(child, self._forks), name=child.spec.name)
                self._keepers.append(keeper)

    def _log_paths(self) -> list[Path]:
        return [child.spec.log_path for child in self.children]

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
        self._logs.cancel()
        await asyncio.gather(*self._keepers, self._logs, return_exceptions=True)

    def kill(self) -> None:
        """Kill every child now."""
        for child in self.children:
            kill(child)


def kill(child: Child) -> None:
    """Its present process, if there is one."""
    if child.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)


async def _keep(child: Child, forks: Forks | None) -> None:
    failures = 0
    while True:
        code = await run_once(child, forks)
        if code == EXIT_USAGE and child.restarts == 0:
            raise ConfigError(f"{child.spec.name}: {last_line(child.spec.log_path)}")
        settled = time.monotonic() - child.started > SETTLED_S
        failures = 1 if settled else failures + 1
        await asyncio.sleep(BACKOFF.wait_s(failures - 1))
        child.restarts += 1


async def run_once(child: Child, forks: Forks | None) -> int:
    """The exit code of one process of the child, which is told to end if this is cancelled. Sets
    ``last_exit``."""
    pulse = Pulse()
    watcher: asyncio.Task[None] | None = None
    try:
        process = await _spawn(child, forks, pulse)
        watcher = asyncio.create_task(_watch(child, pulse))
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _terminate(process)
            raise
        finally:
            child.pid = None
        child.last_exit = "hung" if child.hung else _reason(code)
        return code
    finally:
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        pulse.close()


async def _watch(child: Child, pulse: Pulse) -> None:
    """Kills the process if it hangs."""
    look = _Probe(child.spec.probe).hung if child.spec.probe is not None else None
    stopped_s = 0.0
    while True:
        await asyncio.sleep(alive.INTERVAL_S)
        stopped_s = stopped_s + alive.INTERVAL_S if _is_stopped(child.pid) else 0.0
        # one that starts may be silent for long, but it is not stopped
        silent = stopped_s >= alive.HUNG_S or (child.spec.beats and pulse.hung())
        if silent or (look is not None and await look()):
            log.error("child has hung; killing it", child=child.spec.name, pid=child.pid)
            child.hung = True
            kill(child)
            return


def _is_stopped(pid: int | None) -> bool:
    """Whether the kernel says that a process was stopped by a signal or a debugger."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False


class _Probe:
    """Asks a process that can't beat by itself."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._answered = time.monotonic()
        self._limit_s = alive.STARTING_S

    async def hung(self) -> bool:
        asked = time.monotonic()
        if await asyncio.to_thread(self._ask):
            self._answered, self._limit_s = time.monotonic(), alive.HUNG_S
        elif time.monotonic() - asked > 2 * PROBE_S:
            self._answered += time.monotonic() - asked  # we were kept from asking
        return time.monotonic() - self._answered > self._limit_s


class _Forked:
    """A fork, with what asyncio has for a process."""

    def __init__(self, child: ChildProcess) -> None:
        self._child = child
        self.pid = child.pid

    async def wait(self) -> int:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._child.fileno(), ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._child.fileno())
        code = self._child.poll()
        assert code is not None
        return code

    def terminate(self) -> None:
        self._child.terminate()


_Process = _Forked | asyncio.subprocess.Process


async def _spawn(child: Child, forks: Forks | None, pulse: Pulse) -> _Process:
    child.hung = False
    with child.spec.log_path.open("ab") as log_file:
        forked = await _fork(child.spec, forks, pulse, log_file.fileno())
        process: _Process = forked or await _execute(child.spec, pulse, log_file.fileno())
    pulse.started()
    child.pid, child.started = process.pid, time.monotonic()
    return process


async def _fork(spec: ChildSpec, forks: Forks | None, pulse: Pulse, log_fd: int) -> _Forked | None:
    """None where it has to be started afresh."""
    if forks is None or not spec.fork:
        return None
    try:
        return _Forked(await forks.spawn(spec.command, spec.fork, log_fd, pulse.child_end))
    except OSError as error:
        log.warning("can't fork a child; starting it afresh", child=spec.name, reason=str(error))
        return None


async def _execute(spec: ChildSpec, pulse: Pulse, log_fd: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *bound_to_parent(list(spec.command)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=log_fd,
        stderr=log_fd,
        start_new_session=True,  # Ctrl-C goes to us alone: we stop them in order
        pass_fds=(pulse.child_end,),
        env={**os.environ, alive.ENVIRONMENT: str(pulse.child_end)} if spec.beats else None,
    )


async def _terminate(process: _Process) -> None:
    """Ask it to end and wait; whoever stops us kills it when its time is over."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    await process.wait()


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
