"""A capture's process: whatever it does, it ends as one error and leaves no process behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from precast.errors import CaptureFailed
from services.compile_worker.child import CaptureLimits, run_capture
from tests.support.compile_worker import FACTORS, ROOT, program, starts, wait_until

LIMITS = CaptureLimits(timeout_s=20, memory_bytes=1 << 30)

pytestmark = pytest.mark.asyncio


async def capture(
    tmp_path: Path, how: str = "llama", limits: CaptureLimits = LIMITS
) -> tuple[list[str], float]:
    """(stages, relative error) of one capture."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    stages: list[str] = []

    async def on_stage(stage: str) -> None:
        stages.append(stage)

    spec = {**FACTORS, "architecture": how}
    command = program(tmp_path / "ledger").command
    report = await run_capture(command, spec, out, limits, on_stage)
    return stages, report.max_relative_error


def running(tmp_path: Path) -> list[psutil.Process]:
    """Processes that work for this test: their command line or working set names its folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(tmp_path) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


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
    assert running(tmp_path) == []


async def test_hang_is_killed_at_its_time_limit(tmp_path: Path) -> None:
    limits = CaptureLimits(timeout_s=1.0, memory_bytes=1 << 30)
    started = time.monotonic()
    with pytest.raises(CaptureFailed, match="longer than 1 s"):
        await capture(tmp_path, "hang", limits)
    assert time.monotonic() - started < 6
    assert running(tmp_path) == []


async def test_memory_limit_holds(tmp_path: Path) -> None:
    limits = CaptureLimits(timeout_s=20, memory_bytes=200 << 20)
    with pytest.raises(CaptureFailed, match="more than 200 MB"):
        await capture(tmp_path, "eat", limits)
    assert running(tmp_path) == []


async def test_processes_that_a_capture_leaves_behind_go_too(tmp_path: Path) -> None:
    with pytest.raises(CaptureFailed, match="exit code 1"):
        await capture(tmp_path, "orphan")
    await asyncio.to_thread(wait_until, lambda: orphans(tmp_path) == [], 5)


def orphans(tmp_path: Path) -> list[int]:
    """Processes that have inherited the capture's environment."""
    return [
        process.pid
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("TMPDIR") == str(tmp_path / "out")
    ]


async def test_cancellation_kills_the_capture(tmp_path: Path) -> None:
    task = asyncio.create_task(capture(tmp_path, "hang"))
    await asyncio.to_thread(wait_until, lambda: starts(tmp_path / "ledger"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running(tmp_path) == []


async def test_runs_with_less_priority_where_it_may(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    limits = replace(LIMITS, nice=7, cpus=(cpu,))
    task = asyncio.create_task(capture(tmp_path, "hang", limits))
    await asyncio.to_thread(wait_until, lambda: starts(tmp_path / "ledger"))
    child = psutil.Process(int(starts(tmp_path / "ledger")[0][0]))
    assert child.nice() == min(os.nice(0) + 7, 19)
    assert child.cpu_affinity() == [cpu]
    assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) == 800
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


HOST = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from tests.integration.test_capture_child import capture
asyncio.run(capture(Path(sys.argv[1]), "hang"))
"""


async def test_capture_dies_with_a_killed_worker(tmp_path: Path) -> None:
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path)], cwd=ROOT)
    await asyncio.to_thread(wait_until, lambda: starts(tmp_path / "ledger"))
    host.send_signal(signal.SIGKILL)
    host.wait()
    await asyncio.to_thread(wait_until, lambda: running(tmp_path) == [], 5)
