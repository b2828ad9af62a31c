"""One capture as a child process with limits on time and memory.

Whatever happens to it (a crash, a hang, too much memory, a cancellation), it ends as
``CaptureFailed`` or as the cancellation, its processes are killed and reaped, and the worker goes
on.
"""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import psutil

from precast.errors import CaptureFailed
from precast.graphs.artifacts.manifest import GRAPH_FILE
from services.compile_worker.failures import STDERR_FILE
from services.compile_worker.sandbox.client import Capture, ForkServer, ServerEnded

REPORT_FILE: Final = "report.json"
MAX_REPORT_BYTES: Final = 64 << 10
EXIT_REFUSED: Final = 2
EXIT_DIFFERS: Final = 3
_STDERR_TAIL_BYTES: Final = 8 << 10
_POLL_S: Final = 0.2
_MAX_WAIT: Final = 20
"""Times the limit on a capture's time that it may wait for a CPU beside."""

Seconds = Annotated[float, msgspec.Meta(ge=0.0)]
OnStage = Callable[[str], Awaitable[None]]


@dataclass(frozen=True, kw_only=True)
class CaptureLimits:
    """What one capture may use."""

    timeout_s: float
    """Without what its processes wait for a free CPU: they get only what others leave."""
    memory_bytes: int
    """Resident memory of all its processes together."""


class CaptureReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the capture says of itself in ``report.json``. Times are seconds, or as named."""

    max_relative_error: Seconds = 0.0
    layer_us: Seconds = 0.0
    compile_s: Seconds
    verify_s: Seconds = 0.0
    verified: bool = True
    """False for a graph that the compile worker's CPU can't run."""

    @property
    def capture_s(self) -> float:
        return self.compile_s + self.verify_s


async def run_capture(
    server: ForkServer,
    spec: dict[str, str],
    folder: Path,
    limits: CaptureLimits,
    on_stage: OnStage,
) -> CaptureReport:
    """Capture into ``folder``; ``on_stage`` hears "exporting", "compiling", "verifying".

    Raises ``CaptureFailed`` with one line. A cancelled task kills the capture before it ends. If
    the server dies, which is hardly the capture's fault, it is tried once more with a new one.
    """
    try:
        async with asyncio.timeout(limits.timeout_s) as deadline:
            extending = asyncio.create_task(_extend(deadline, server, limits.timeout_s * _MAX_WAIT))
            try:
                return await _run(server, spec, folder, limits, on_stage)
            except ServerEnded:
                return await _run(server, spec, folder, limits, on_stage)
            finally:
                extending.cancel()
    except TimeoutError:
        raise CaptureFailed(f"capture took longer than {limits.timeout_s:g} s") from None


async def _run(
    server: ForkServer,
    spec: dict[str, str],
    folder: Path,
    limits: CaptureLimits,
    on_stage: OnStage,
) -> CaptureReport:
    try:
        async with server.capture(spec, folder) as capture:
            code = await _see_through(capture, limits, on_stage)
    finally:
        stderr = _tail(folder / STDERR_FILE)
    _check_exit(code, stderr)
    return _read_report(folder)


async def _see_through(capture: Capture, limits: CaptureLimits, on_stage: OnStage) -> int:
    """Until the capture ends; its exit code."""
    first = await capture.message()
    if "exit" in first:
        return int(first["exit"])
    watchdog = asyncio.create_task(_watch_memory(int(first["pid"]), limits.memory_bytes))
    hear = asyncio.create_task(_hear(capture, on_stage))
    try:
        await asyncio.wait({watchdog, hear}, return_when=asyncio.FIRST_COMPLETED)
        if watchdog.done():
            await watchdog  # raises: it ends only at a breach
        return await hear
    finally:
        watchdog.cancel()
        hear.cancel()
        await asyncio.gather(watchdog, hear, return_exceptions=True)


async def _hear(capture: Capture, on_stage: OnStage) -> int:
    """Report stages, skip all else that a compiler may print; the exit code."""
    while "exit" not in (message := await capture.message()):
        if "stage" in message:
            await on_stage(str(message["stage"]))
    return int(message["exit"])


def _tail(path: Path) -> bytes:
    """The last of stderr; the file is cut to it."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - _STDERR_TAIL_BYTES, 0))
            tail = file.read()
        path.write_bytes(tail)
    except OSError:
        return b""
    return tail


async def _watch_memory(pid: int, limit: int) -> None:
    """Raises ``CaptureFailed`` once the process tree uses more than ``limit`` bytes."""
    while True:
        used = await asyncio.to_thread(_resident_bytes, pid)
        if used > limit:
            raise CaptureFailed(f"capture used more than {limit >> 20} MB of memory")
        await asyncio.sleep(_POLL_S)


def _resident_bytes(pid: int) -> int:
    total = 0
    for process in _tree(pid):
        with suppress(psutil.Error):
            total += process.memory_info().rss
    return total


async def _extend(deadline: asyncio.Timeout, server: ForkServer, most_s: float) -> None:
    """Move a deadline by what the captures wait for a free CPU, up to ``most_s``."""
    seen: dict[int, float] = {}
    then = time.monotonic()
    while most_s > 0 and not deadline.expired():
        await asyncio.sleep(_POLL_S)
        now, used = time.monotonic(), await asyncio.to_thread(_runnable, server.pid)
        # Only one works at a time: the others wait for it.
        waits = [now - then - (cpu - seen[pid]) for pid, cpu in used.items() if pid in seen]
        more = min(max(0.0, *waits, 0.0), most_s)
        when = deadline.when()
        if more and when is not None and not deadline.expired():
            deadline.reschedule(when + more)
        seen, then, most_s = used, now, most_s - more


def _runnable(pid: int | None) -> dict[int, float]:
    """CPU seconds of each process of a tree that runs or would run."""
    found = {}
    for process in _tree(pid) if pid else ():
        with suppress(psutil.Error):
            if process.status() == psutil.STATUS_RUNNING:
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
    return found


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _check_exit(code: int, stderr: bytes) -> None:
    lines = stderr.decode(errors="replace").strip().splitlines()
    said = lines[-1][:500] if lines else "no message"
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
