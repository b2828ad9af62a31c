"""When processes count as hung."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import psutil
import pytest

from services.decode_worker.ranks import watch
from services.decode_worker.ranks.watch import HUNG_S, LOOK_S, Watch

Start = Callable[[str], int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Pids of Python programs that run meanwhile."""
    running: list[subprocess.Popen[str]] = []

    def program(code: str) -> int:
        command = [sys.executable, "-Sc", f"print('runs', flush=True)\n{code}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None and process.stdout.readline() == "runs\n"
        return process.pid

    yield program
    for process in running:
        process.kill()
        process.communicate()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


SLEEPS, WORKS = "import time; time.sleep(60)", "while True: pass"


def wait_for(pid: int, status: str) -> None:
    deadline = time.monotonic() + 30
    while psutil.Process(pid).status() != status:
        assert time.monotonic() < deadline, f"{psutil.Process(pid).status()}, not {status}"
        time.sleep(0.01)


def seconds_to_hang(watched: Watch, forward: Callable[[float], None], limit: int = 20) -> float:
    for second in range(1, limit + 1):
        forward(LOOK_S)
        if watched.hung() is not None:
            return second
    return float("inf")


def test_a_stopped_process_has_hung_though_another_works(
    start: Start, clock: Callable[[float], None]
) -> None:
    pids = [start(WORKS), start(SLEEPS)]
    os.kill(pids[1], signal.SIGSTOP)
    os.waitid(os.P_PID, pids[1], os.WSTOPPED | os.WNOWAIT)
    watched = Watch(pids)
    assert seconds_to_hang(watched, clock) == HUNG_S
    assert watched.hung() == "rank 1 is stopped"


def test_processes_of_which_one_works_get_on(start: Start, clock: Callable[[float], None]) -> None:
    pids = [start(SLEEPS), start(WORKS)]
    wait_for(pids[1], psutil.STATUS_RUNNING)
    assert seconds_to_hang(Watch(pids), clock) == float("inf")


def test_processes_that_all_sleep_have_hung(start: Start, clock: Callable[[float], None]) -> None:
    pids = [start(SLEEPS), start(SLEEPS)]
    for pid in pids:
        wait_for(pid, psutil.STATUS_SLEEPING)
    watched = Watch(pids)
    assert seconds_to_hang(watched, clock) == pytest.approx(HUNG_S, abs=1)


def test_who_was_kept_from_looking_blames_nobody(
    start: Start, clock: Callable[[float], None]
) -> None:
    """As after a host was frozen, the looker with it."""
    pid = start(SLEEPS)
    wait_for(pid, psutil.STATUS_SLEEPING)
    watched = Watch([pid])
    clock(1.0)
    watched.hung()
    clock(600.0)
    assert watched.hung() is None


def test_a_kernel_that_says_nothing_is_no_fault(clock: Callable[[float], None]) -> None:
    assert seconds_to_hang(Watch([2**22 + 1]), clock) == float("inf")
