"""A capture's process: whatever it does, it ends as one error and leaves no process behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from precast.errors import CaptureFailed
from services.compile_worker.sandbox import capture as capturing
from services.compile_worker.sandbox.capture import CaptureLimits, run_capture
from services.compile_worker.sandbox.client import ForkServer
from tests.support.compile_worker import FACTORS, ROOT, program, starts, wait_until
from tests.support.processes import words

LIMITS = CaptureLimits(timeout_s=20, memory_bytes=1 << 30)

pytestmark = pytest.mark.asyncio


@asynccontextmanager
async def fork_server(tmp_path: Path, **options: Any) -> AsyncIterator[ForkServer]:
    captures, before = program(tmp_path / "ledger"), descendants()
    server = ForkServer(captures.module, captures.arguments, **{"idle": False, **options})
    try:
        yield server
    finally:
        await server.stop()
        assert set(descendants()) <= set(before)


async def capture(
    tmp_path: Path,
    how: str = "llama",
    limits: CaptureLimits = LIMITS,
    server: ForkServer | None = None,
) -> tuple[list[str], float]:
    """(stages, relative error) of one capture."""
    if server is None:
        async with fork_server(tmp_path) as server:
            return await capture(tmp_path, how, limits, server)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    stages: list[str] = []

    async def on_stage(stage: str) -> None:
        stages.append(stage)

    spec = {**FACTORS, "architecture": how}
    try:
        report = await run_capture(server, spec, out, limits, on_stage)
    finally:
        assert server.pid is None or descendants(server.pid) == []
    return stages, report.max_relative_error


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Processes that come from this one, or from a server."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def running(tmp_path: Path) -> list[psutil.Process]:
    """Processes that work for this test: their command line names its folder."""
    return [
        process
        for process in psutil.process_iter()
        if process.pid != os.getpid() and str(tmp_path) in " ".join(words(process.pid))
    ]


def is_over(process: psutil.Process) -> bool:
    """Dead; whether it was reaped is up to whom it came to when its parent died."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


async def started(tmp_path: Path, count: int = 1, deadline_s: float = 60.0) -> psutil.Process:
    """The capture that has started as the ``count``-th."""
    ledger = tmp_path / "ledger"
    await asyncio.to_thread(wait_until, lambda: len(starts(ledger)) >= count, deadline_s)
    return psutil.Process(int(starts(ledger)[count - 1][0]))


async def test_reports_stages_and_result(tmp_path: Path) -> None:
    stages, error = await capture(tmp_path)
    assert stages == ["exporting", "compiling", "verifying"]
    assert error == 1e-6
    assert (tmp_path / "out" / "graph.pt2").stat().st_size > 0


async def test_output_that_is_no_progress_is_skipped(tmp_path: Path) -> None:
    stages, _ = await capture(tmp_path, "noisy")
    assert stages == ["exporting", "compiling", "verifying"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("crash", r"signal 11 \(Segmentation fault\)"),
        ("exit", "exit code 1: RuntimeError: no such operator"),
        ("refuse", "refused the graph: spec refused: kv_heads is odd"),
        ("differ", "verification failed: graph differs from eager"),
        ("silent", "no usable report"),
    ],
)
async def test_failure_is_one_line(tmp_path: Path, how: str, reason: str) -> None:
    with pytest.raises(CaptureFailed, match=reason) as failure:
        await capture(tmp_path, how)
    assert "\n" not in str(failure.value)


async def test_hang_is_killed_at_its_time_limit(tmp_path: Path) -> None:
    limits = CaptureLimits(timeout_s=1.0, memory_bytes=1 << 30)
    started = time.monotonic()
    with pytest.raises(CaptureFailed, match="longer than 1 s"):
        await capture(tmp_path, "hang", limits)
    assert time.monotonic() - started < LIMITS.timeout_s / 2


async def test_memory_limit_holds(tmp_path: Path) -> None:
    limits = CaptureLimits(timeout_s=20, memory_bytes=200 << 20)
    with pytest.raises(CaptureFailed, match="more than 200 MB"):
        await capture(tmp_path, "eat", limits)


async def test_processes_that_a_capture_leaves_behind_go_too(tmp_path: Path) -> None:
    with pytest.raises(CaptureFailed, match="exit code 1"):
        await capture(tmp_path, "orphan")
    await asyncio.to_thread(wait_until, lambda: orphans(tmp_path) == [])


def orphans(tmp_path: Path) -> list[int]:
    """Processes that have inherited the capture's environment."""
    return [
        process.pid
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("TMPDIR") == str(tmp_path / "out")
    ]


async def test_cancellation_kills_the_capture(tmp_path: Path) -> None:
    async with fork_server(tmp_path) as server:
        task = asyncio.create_task(capture(tmp_path, "hang", server=server))
        process = await started(tmp_path)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_over(process)


@pytest.mark.timeout(400)
async def test_takes_only_what_others_leave(tmp_path: Path) -> None:
    """Others may leave next to nothing for minutes."""
    cpu, limits = min(os.sched_getaffinity(0)), CaptureLimits(timeout_s=300, memory_bytes=1 << 30)
    async with fork_server(tmp_path, idle=True, cpus=(cpu,)) as server:
        task = asyncio.create_task(capture(tmp_path, "hang", limits, server))
        child = await started(tmp_path, deadline_s=300)
        await asyncio.to_thread(wait_until, child.children, 60)
        for process in (child, *child.children(recursive=True)):  # as compilers are
            assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
            assert process.cpu_affinity() == [cpu]
        assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) == 800
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_waiting_for_a_cpu_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that would run and gets no CPU has more time, but not for ever."""
    monkeypatch.setattr(capturing, "_runnable", lambda _: {1: 0.0})
    monkeypatch.setattr(capturing, "_MAX_WAIT", 4)
    limits = CaptureLimits(timeout_s=1.0, memory_bytes=1 << 30)
    async with fork_server(tmp_path) as server:
        (tmp_path / "ledger" / "pace").write_text("1.3")
        await capture(tmp_path, "llama", limits, server)
        began = time.monotonic()
        with pytest.raises(CaptureFailed, match="longer than 1 s"):
            await capture(tmp_path, "hang", limits, server)
        assert time.monotonic() - began > 4


async def test_a_process_that_works_or_sleeps_does_not_wait() -> None:
    pid = os.getpid()
    before = capturing._runnable(pid)[pid]
    while time.process_time() < before + 0.2:
        pass
    assert capturing._runnable(pid)[pid] >= before + 0.1
    sleeper = subprocess.Popen(["sleep", "600"])
    await asyncio.to_thread(wait_until, lambda: sleeper.pid not in capturing._runnable(pid))
    sleeper.kill()
    sleeper.wait()


async def test_captures_share_a_server_and_fail_alone(tmp_path: Path) -> None:
    async with fork_server(tmp_path) as server:
        hanging = asyncio.create_task(capture(tmp_path, "hang", server=server))
        other = tmp_path / "other"
        other.mkdir()

        async def on_stage(_: str) -> None:
            pass

        async def beside(how: str) -> None:
            await run_capture(server, {**FACTORS, "architecture": how}, other, LIMITS, on_stage)

        process, pid = await started(tmp_path), server.pid
        with pytest.raises(CaptureFailed, match="signal 11"):
            await beside("crash")
        await beside("llama")
        assert process.is_running()
        assert server.pid == pid
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)


async def test_capture_killed_from_outside_says_so(tmp_path: Path) -> None:
    async with fork_server(tmp_path) as server:
        task = asyncio.create_task(capture(tmp_path, "hang", server=server))
        (await started(tmp_path)).kill()
        with pytest.raises(CaptureFailed, match=r"signal 9 \(Killed\)"):
            await task
        assert await capture(tmp_path, server=server)


async def test_capture_whose_server_dies_is_done_by_another(tmp_path: Path) -> None:
    async with fork_server(tmp_path) as server:
        task = asyncio.create_task(capture(tmp_path, "gated", server=server))
        first, pid = await started(tmp_path), server.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        second = await started(tmp_path, 2)
        assert is_over(first)
        assert server.pid != pid
        assert second.ppid() == server.pid
        (tmp_path / "ledger" / "open").touch()
        stages, _ = await task
        assert stages == ["exporting", "exporting", "compiling", "verifying"]


async def test_server_that_cant_start_is_a_failed_capture(tmp_path: Path) -> None:
    server = ForkServer("no.such.program", (), idle=False)
    with pytest.raises(CaptureFailed, match="capture server has ended"):
        await capture(tmp_path, server=server)
    await server.stop()


HOST = """
import asyncio, sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tests.integration.test_capture_child import capture
asyncio.run(capture(Path(sys.argv[1]), "hang"))
"""


async def test_capture_dies_with_a_killed_worker(tmp_path: Path) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path)], cwd=ROOT)
    process = await started(tmp_path)
    host.send_signal(signal.SIGKILL)
    host.wait()
    await asyncio.to_thread(wait_until, lambda: running(tmp_path) == [])
    assert is_over(process)
