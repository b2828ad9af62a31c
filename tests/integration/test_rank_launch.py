"""Ranks don't outlive a start that fails."""

import os
import subprocess
import sys
from pathlib import Path

import psutil


def test_a_start_that_fails_leaves_no_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "precast", "decode-worker", "--model=missing", "--tp=2"]
    with subprocess.Popen(
        [*command, f"--home={tmp_path}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as leader:
        assert leader.stderr
        assert b"missing" in leader.stderr.read()  # until nobody has it open any more
        assert leader.wait(60) == 1
    assert [pid for pid in psutil.pids() if _session(pid) == leader.pid] == []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0
