"""Children that die with their parent, and CPU lists."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from precast.system.process import available_cpus, parse_cpus, pin


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pid: int, deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} goes on"
        time.sleep(0.01)


def start_parent(script: str) -> tuple[subprocess.Popen[bytes], int]:
    """A parent process that prints its child's pid."""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    with parent.stdout as out:
        return parent, int(out.readline())


def test_a_bound_command_ends_when_its_parent_is_killed() -> None:
    parent, child = start_parent(
        "import subprocess, time; from precast.system.process import bound_to_parent as b\n"
        "p = subprocess.Popen(b(['sleep', '600'])); print(p.pid, flush=True); time.sleep(600)"
    )
    # the shim becomes the command only after it has bound itself
    end = time.monotonic() + 10
    while Path(f"/proc/{child}/comm").read_text().strip() != "sleep":
        assert time.monotonic() < end
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    wait_for_end(child)


def test_a_child_whose_parent_is_gone_already_ends() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    script = f"import signal, precast.system.process as p; p.die_with_parent(parent={gone.pid})"
    assert subprocess.run([sys.executable, "-c", script], timeout=20).returncode == -9


@pytest.mark.parametrize(("text", "cpus"), [("0", (0,)), ("0,1", (0, 1)), ("2-4, 0", (2, 3, 4, 0))])
def test_parse_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "a", "1,", "1,1", "3-1", "-1", "0-1,1"])
def test_parse_cpus_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="CPU"):
        parse_cpus(text)


def test_pin() -> None:
    before = available_cpus()
    try:
        pin(before[:1])
        assert available_cpus() == before[:1]
    finally:
        os.sched_setaffinity(0, before)
