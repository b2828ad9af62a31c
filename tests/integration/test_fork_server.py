"""Processes out of a fork server: whose children they are, what they get, how they end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from precast.cli import head_start
from precast.system.fork_server import ForkServer, Order

pytestmark = pytest.mark.timeout(60)
MODULE = "tests.integration.test_fork_server"
OWNER = """
import sys, time
from precast.cli import head_start
from precast.system.fork_server import ForkServer, Order
server = ForkServer.start("tests.integration.test_fork_server")
child = server.spawn(Order(command_line=["sleeper"], arguments=["sleep"]))
print(child.pid, server._process.pid, flush=True)
time.sleep(60)
"""


def preload() -> None:
    """What the servers of these tests import is this module."""


def main(arguments: Sequence[str], descriptors: Sequence[int]) -> int:
    match arguments:
        case ["sleep"]:
            time.sleep(60)
        case ["write", text]:
            os.write(descriptors[-1], text.encode())
        case ["print", text]:
            print(text)
        case ["exit", code]:
            sys.exit(int(code))
        case ["fail"]:
            raise RuntimeError("as asked")
    return 0


def until(check: Callable[[], bool], deadline_s: float = 20.0) -> None:
    end = time.monotonic() + deadline_s
    while not check():
        assert time.monotonic() < end, "deadline passed"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    running = ForkServer.start(MODULE)
    yield running
    running.close()


def order(*arguments: str, **changes: object) -> Order:
    return Order(command_line=["precast", "test"], arguments=arguments, **changes)  # type: ignore[arg-type]


def test_a_fork_is_our_child_and_shown_by_its_own_name(server: ForkServer) -> None:
    named = Order(command_line=["precast", "gateway", "--port=1"], arguments=["sleep"])
    child = server.spawn(named)
    process = psutil.Process(child.pid)
    until(lambda: "gateway" in process.cmdline())
    assert process.ppid() == os.getpid()
    assert process.cmdline()[:3] == ["precast", "gateway", "--port=1"]
    child.terminate()
    assert child.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(("arguments", "code"), [(["exit", "3"], 3), (["fail"], 1), ([], 0)])
def test_it_ends_with_its_own_code(server: ForkServer, arguments: list[str], code: int) -> None:
    assert server.spawn(order(*arguments)).wait(10) == code


def test_it_gets_descriptors_and_a_log(server: ForkServer, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with (tmp_path / "log").open("ab") as log, os.fdopen(reading, "rb") as pipe:
        child = server.spawn(order("write", "heard", log=True), [log.fileno(), writing])
        os.close(writing)
        assert pipe.read() == b"heard"  # ends only when nobody has the other end: not the server
        assert child.wait(10) == 0
        assert server.spawn(order("print", "logged", log=True), [log.fileno()]).wait(10) == 0
    assert (tmp_path / "log").read_text() == "logged\n"


def test_threads_may_ask_at_once(server: ForkServer) -> None:
    codes: list[int] = []

    def ask(code: int) -> None:
        codes.append(server.spawn(order("exit", str(code))).wait(10))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == list(range(8))


def test_forks_outlive_the_server_and_an_ended_server_says_so() -> None:
    server = ForkServer.start(MODULE)
    child = server.spawn(order("sleep"))
    os.kill(server._process.pid, signal.SIGKILL)
    until(lambda: not server.alive)
    with pytest.raises(OSError, match=r"."):
        server.spawn(order("sleep"))
    assert child.poll() is None
    child.kill()
    child.wait(10)
    server.close()


def test_server_and_forks_end_with_their_owner() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        pids = [int(pid) for pid in owner.stdout.readline().split()]
        assert len(pids) == 2
        owner.kill()
    until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_command_begins_with_what_takes_it_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "MODULES", {"slow": MODULE})
    for others in ([], ["other"], ["slow", "--help"]):
        head_start.begin(["precast", *others])
        assert head_start.taken(MODULE) is None
    head_start.begin(["precast", "slow", "--port=1"])
    server = head_start.taken(MODULE)
    assert server is not None
    child = server.spawn(Order(command_line=["begun"], arguments=["exit", "3"]))
    assert child.wait(20) == 3
    assert head_start.taken(MODULE) is None
    server.close()
