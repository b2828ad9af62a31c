"""Ranks don't outlive a start that fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from precast.system import fork_server
from precast.system.fork_server import ForkServer
from services.decode_worker.ranks import launcher as launcher_module
from services.decode_worker.ranks.launcher import RankLauncher

MODULE = "tests.support.simulated_rank"
NURSERY = "tests.integration.test_rank_launch"


def preload() -> None:
    """This module is a nursery in its tests."""


def main(_: Sequence[str], descriptors: Sequence[int]) -> int:
    """A rank that says who it is."""
    os.write(descriptors[0], str(os.getpid()).encode())
    os.read(descriptors[0], 1)
    return 0


async def forked(launcher: RankLauncher) -> bool:
    """Whether the next rank is a nursery's, and what is told of it is right."""
    rank = await launcher.take()
    rank.connection.settimeout(30)
    is_fork = not isinstance(rank.process, subprocess.Popen)
    if is_fork:
        assert int(rank.connection.recv(99)) == rank.process.pid
    rank.connection.close()
    rank.process.wait(20)
    return is_fork


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_nursery_that_is_gone_or_hangs_is_followed_by_another(
    signum: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that goes on later must not answer to orders with ranks of earlier ones."""
    monkeypatch.setattr(launcher_module, "NURSERY_MODULE", NURSERY)
    monkeypatch.setattr(fork_server, "ANSWER_S", 0.5)
    launcher = RankLauncher(MODULE, ForkServer.start(NURSERY))
    assert await forked(launcher)
    assert launcher._forks is not None
    nursery = launcher._forks._process
    nursery.send_signal(signum)
    if signum == signal.SIGKILL:
        nursery.wait()
    assert not await forked(launcher)
    assert nursery.poll() is not None
    assert [await forked(launcher) for _ in range(2)] == [True, True]
    launcher.close()


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
