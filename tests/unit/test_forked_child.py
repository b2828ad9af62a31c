"""A fork with what subprocess.Popen has for a child."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from precast.system.process import ForkedChild
from tests.support.decode_worker import eventually


def sleep_long() -> int:
    time.sleep(60)
    return 0


def test_its_exit_code_is_what_main_gives() -> None:
    child = ForkedChild(lambda: 7)
    assert child.wait(10) == 7
    assert (child.poll(), child.returncode) == (7, 7)


def test_an_exception_is_told_and_is_exit_code_1(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise RuntimeError("no way")

    assert ForkedChild(fail).wait(10) == 1
    assert "RuntimeError: no way" in capfd.readouterr().err


def test_waiting_has_an_end_and_a_signal_is_a_negative_code() -> None:
    child = ForkedChild(sleep_long)
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(10) == -signal.SIGTERM
    child.kill()  # of one that has ended: nothing happens


def test_it_dies_with_its_parent() -> None:
    reading, writing = os.pipe()

    def parent() -> int:
        os.write(writing, str(ForkedChild(sleep_long).pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert ForkedChild(parent).wait(10) == -signal.SIGKILL
    pid = int(os.read(reading, 20))
    eventually(lambda: is_gone(pid), 10)
    os.close(reading)
    os.close(writing)


def is_gone(pid: int) -> bool:
    """Ended, whether or not whoever has it now has looked."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
