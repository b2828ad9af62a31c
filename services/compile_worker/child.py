"""One capture as a child process with limits on time and memory.

Whatever happens to it (a crash, a hang, too much memory, a cancellation), it ends as
``CaptureFailed`` or as the cancellation, its processes are killed and reaped, and the worker goes
on.
"""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import psutil

from precast.errors import CaptureFailed
from precast.graphs.artifact import GRAPH_FILE
from services.compile_worker import launch
from services.compile_worker.failures import STDERR_FILE

REPORT_FILE: Final = "report.json"
MAX_REPORT_BYTES: Final = 64 << 10
EXIT_REFUSED: Final = 2
EXIT_DIFFERS: Final = 3
_STDERR_TAIL_BYTES: Final = 8 << 10
_MEMORY_POLL_S: Final = 0.2
_REAP_S: Final = 10.0

Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
OnStage = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class CaptureLimits:
    """What one capture may use."""

    timeout_s: float
    memory_bytes: int
    """Resident memory of all its processes together."""
    nice: int = 10
    """Added to the niceness, so that decode workers on the same machine come first."""
    cpus: tuple[int, ...] = ()
    """CPUs on which it may run; none: wherever this process may."""


class CaptureReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the capture says of itself in ``report.json``. Times are seconds but for ``step_us``."""

    max_relative_error: Seconds = 0.0
    step_us: Seconds = 0.0
    compile_s: Seconds
    verify_s: Seconds = 0.0
    verified: bool = True
    """False for a graph that the compile worker's CPU can't run."""

    @property
    def capture_s(self) -> float:
        return self.compile_s + self.verify_s


async def run_capture(
    command: Sequence[str],
    spec: dict[str, str],
    folder: Path,
    limits: CaptureLimits,
    on_stage: OnStage,
) -> CaptureReport:
    """Capture into ``folder``; ``on_stage`` hears "exporting", "compiling", "verifying".

    Raises ``CaptureFailed`` with one line. A cancelled task kills the capture before it ends.
    """
    try:
        async with asyncio.timeout(limits.timeout_s):
            return await _run(command, spec, folder, limits, on_stage)
    except TimeoutError:
        raise CaptureFailed(f"capture took longer than {limits.timeout_s:g} s") from None


async def _run(
    command: Sequence[str],
    spec: dict[str, str],
    folder: Path,
    limits: CaptureLimits,
    on_stage: OnStage,
) -> CaptureReport:
    async with _started([*command, "--out", str(folder)], folder, limits) as started:
        process, status = started
        watchdog = asyncio.create_task(_watch_memory(process.pid, limits.memory_bytes))
        talk = asyncio.create_task(_talk(process, spec, on_stage))
        try:
            await asyncio.wait({watchdog, talk}, return_when=asyncio.FIRST_COMPLETED)
            if watchdog.done():
                await watchdog  # raises: it ends only at a breach
            stderr = await talk
        finally:
            watchdog.cancel()
            talk.cancel()
            await asyncio.gather(watchdog, talk, return_exceptions=True)
        (folder / STDERR_FILE).write_bytes(stderr)
        _check_exit(os.read(status, 16), stderr)
    return _read_report(folder)


@asynccontextmanager
async def _started(
    command: Sequence[str], folder: Path, limits: CaptureLimits
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """The capture's processes in a group of their own, and a pipe that gets the exit code.

    At the end the whole group is dead.
    """
    (their_lifeline, lifeline), (status, their_status) = os.pipe(), os.pipe()
    launcher = (sys.executable, "-I", launch.__file__, str(their_lifeline), str(their_status))
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *(*launcher, str(limits.nice), ",".join(map(str, limits.cpus)), *command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                # what compilers leave in TMPDIR goes with the folder, even after a SIGKILL
                env={**os.environ, "TMPDIR": str(folder)},
                pass_fds=(their_lifeline, their_status),
                start_new_session=True,
            )
        finally:
            os.close(their_lifeline)
            os.close(their_status)
        try:
            yield process, status
        finally:
            await _kill_group(process)
    finally:
        os.close(lifeline)
        os.close(status)


async def _kill_group(process: asyncio.subprocess.Process) -> None:
    """Kill every process of the group, also those that outlive its leader, and reap the leader."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # shielded: a second cancellation must not leave a zombie
    with suppress(TimeoutError):
        await asyncio.shield(asyncio.wait_for(process.wait(), _REAP_S))


async def _talk(
    process: asyncio.subprocess.Process, spec: dict[str, str], on_stage: OnStage
) -> bytes:
    """Send the spec, hear the stages, wait for the end. Returns the last of stderr."""
    assert process.stdin
    assert process.stdout
    assert process.stderr
    stderr = asyncio.create_task(_tail(process.stderr))
    try:
        with suppress(ConnectionError):  # a child that is dead already says more by its exit code
            process.stdin.write(msgspec.json.encode(spec))
            await process.stdin.drain()
            process.stdin.close()
        await _hear_stages(process.stdout, on_stage)
        await process.wait()
        return await stderr
    finally:
        stderr.cancel()


async def _hear_stages(stdout: asyncio.StreamReader, on_stage: OnStage) -> None:
    """Report stage lines and skip all else that a compiler may print."""
    while True:
        try:
            line = await stdout.readline()
        except ValueError:  # longer than the reader's buffer
            continue
        if not line:
            return
        with suppress(msgspec.DecodeError, KeyError):
            await on_stage(msgspec.json.decode(line, type=dict[str, str])["stage"])


async def _tail(stream: asyncio.StreamReader) -> bytes:
    tail = b""
    while chunk := await stream.read(4096):
        tail = (tail + chunk)[-_STDERR_TAIL_BYTES:]
    return tail


async def _watch_memory(pid: int, limit: int) -> None:
    """Raises ``CaptureFailed`` once the process tree uses more than ``limit`` bytes."""
    while True:
        used = await asyncio.to_thread(_resident_bytes, pid)
        if used > limit:
            raise CaptureFailed(f"capture used more than {limit >> 20} MB of memory")
        await asyncio.sleep(_MEMORY_POLL_S)


def _resident_bytes(pid: int) -> int:
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _check_exit(status: bytes, stderr: bytes) -> None:
    """Judge the command by its exit code; none was written if something killed the whole group."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1][:500] if lines else "no message"
    code = int(status) if status else -signal.SIGKILL
    if code == EXIT_REFUSED:
        raise CaptureFailed(f"capture refused the graph: {said}")
    if code == EXIT_DIFFERS:
        raise CaptureFailed(f"verification failed: {said}")
    if code < 0:
        name = signal.strsignal(-code) or "unknown"
        raise CaptureFailed(f"capture was ended by signal {-code} ({name}): {said}")
    if code != 0:
        raise CaptureFailed(f"capture ended with exit code {code}: {said}")


def _read_report(folder: Path) -> CaptureReport:
    path = folder / REPORT_FILE
    try:
        if path.stat().st_size > MAX_REPORT_BYTES or not (folder / GRAPH_FILE).is_file():
            raise CaptureFailed("capture left no graph or an oversized report")
        return msgspec.json.decode(path.read_bytes(), type=CaptureReport)
    except (OSError, msgspec.DecodeError) as error:
        raise CaptureFailed(f"capture left no usable report: {error}") from None
