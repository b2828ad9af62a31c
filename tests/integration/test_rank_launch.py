"""Ranks are started before their leader needs them, and don't outlive a start that fails."""

import os
import subprocess
import sys
from pathlib import Path

import psutil

from services.decode_worker.ranks.launcher import RankLauncher

MODULE = "tests.support.simulated_rank"


async def test_early_ranks_are_given_out_first_and_the_rest_ended() -> None:
    launcher = RankLauncher(MODULE)
    launcher.start_early(2)
    first, later = await launcher.take(), launcher._waiting[0]
    launcher.close()
    assert later.process.returncode is not None
    assert first.process.poll() is None
    another = await launcher.take()
    assert another.process.pid not in (first.process.pid, later.process.pid)
    for rank in (first, another):
        rank.connection.close()
        assert rank.process.wait(20) == 0


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
        assert leader.wait(20) == 1
    assert [pid for pid in psutil.pids() if _session(pid) == leader.pid] == []


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0
