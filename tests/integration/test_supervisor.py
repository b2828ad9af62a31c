"""The supervisor: real children that crash, refuse, ignore signals and lose their parent."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from precast.cli import logs
from precast.cli.status import CaptureClock
from precast.cli.supervisor import ChildSpec, Supervisor
from precast.errors import ConfigError
from precast.system import alive

DEADLINE_S = 60.0
HELD_UP_S = 10.0
"""What a busy machine may take from a process that keeps a deadline."""
SLEEPER = "import time; print('up', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEPER}"


def spec(tmp_path: Path, program: str, name: str = "child") -> ChildSpec:
    return ChildSpec(
        name=name, command=(sys.executable, "-c", program), log_path=tmp_path / f"{name}.log"
    )


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not check():
            await asyncio.sleep(0.02)


async def test_restarts_a_child_that_is_killed(tmp_path: Path) -> None:
    supervisor = Supervisor([spec(tmp_path, SLEEPER)])
    (child,) = supervisor.children
    supervisor.start(["child"])
    await until(lambda: child.pid is not None)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.restarts == 1 and child.pid not in (None, first))
    assert child.last_exit == "SIGKILL"
    supervisor.check()
    second = child.pid
    await supervisor.stop(DEADLINE_S)
    assert second is not None
    assert not psutil.pid_exists(second)


async def test_children_that_hang_are_killed_within_ten_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In each way in which one can, all at once."""
    assert alive.HUNG_S + 2 * alive.INTERVAL_S <= 10
    monkeypatch.setattr(alive, "HUNG_S", 4.0)
    answers = [True, True]
    sleeper = spec(tmp_path, SLEEPER, "stopped while it starts")
    silent = replace(spec(tmp_path, SLEEPER, "silent"), probe=lambda: answers and answers.pop())
    supervisor = Supervisor(
        [
            replace(spec(tmp_path, hangs(tmp_path / "sleeps", "await"), "stopped"), beats=True),
            replace(spec(tmp_path, hangs(tmp_path / "blocks", "time"), "blocked"), beats=True),
            replace(sleeper, beats=True),
            silent,
        ]
    )
    stopped, _, starting, _ = supervisor.children
    supervisor.start([child.spec.name for child in supervisor.children])
    await until(lambda: starting.pid is not None)
    assert starting.pid is not None
    os.kill(starting.pid, signal.SIGSTOP)
    await until(lambda: (tmp_path / "sleeps").exists() and (tmp_path / "blocks").exists())
    assert stopped.pid is not None
    os.kill(stopped.pid, signal.SIGSTOP)
    begun = time.monotonic()
    await until(lambda: all(child.restarts == 1 for child in supervisor.children))
    assert time.monotonic() - begun < 8.0 + HELD_UP_S
    assert {child.last_exit for child in supervisor.children} == {"hung"}
    await asyncio.sleep(2.0)
    assert [child.restarts for child in supervisor.children[:2]] == [1, 1]
    await supervisor.stop(DEADLINE_S)


def hangs(once: Path, how: str) -> str:
    """A program that beats for 1.5 s, and hangs then unless there is a file ``once``: "await": it
    is asleep, and beats; "time": it blocks its loop."""
    return f"""
import asyncio, pathlib, time
from precast.system.alive import keep_beating
async def main():
    beating = asyncio.create_task(keep_beating())
    await asyncio.sleep(1.5)
    if not pathlib.Path({str(once)!r}).exists():
        pathlib.Path({str(once)!r}).touch()
        {"time.sleep(600)" if how == "time" else "await asyncio.sleep(600)"}
    await asyncio.sleep(600)
asyncio.run(main())
"""


async def test_a_log_stays_bounded_while_its_child_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "LOG_BYTES", 50_000)
    monkeypatch.setattr(logs, "LOOK_S", 0.05)
    writer = "import time\nfor i in range(10**9): print(i, flush=True); time.sleep(1e-4)"
    supervisor = Supervisor([spec(tmp_path, writer)])
    supervisor.start(["child"])
    log, aside = tmp_path / "child.log", tmp_path / "child.log.1"
    await until(aside.exists)
    first = aside.read_bytes()
    await until(lambda: aside.read_bytes()[:20] != first[:20])
    assert log.stat().st_size + aside.stat().st_size < 500_000
    assert b"\0" not in log.read_bytes()
    assert supervisor.children[0].restarts == 0
    await supervisor.stop(DEADLINE_S)


async def test_a_child_that_refuses_its_settings_is_not_restarted(tmp_path: Path) -> None:
    refuse = "import sys; sys.stderr.write('precast: tp = 9: too many\\n'); sys.exit(2)"
    supervisor = Supervisor([spec(tmp_path, refuse, "worker")])
    supervisor.start(["worker"])

    def refused() -> bool:
        try:
            supervisor.check()
        except ConfigError:
            return True
        return False

    await until(refused)
    with pytest.raises(ConfigError, match=r"^worker: tp = 9: too many$"):
        supervisor.check()
    assert supervisor.children[0].restarts == 0
    await supervisor.stop(DEADLINE_S)


async def test_a_stubborn_child_is_killed_at_the_deadline(tmp_path: Path) -> None:
    one, two = spec(tmp_path, STUBBORN, "one"), spec(tmp_path, SLEEPER, "two")
    supervisor = Supervisor([one, two])
    supervisor.start(["one", "two"])
    await until(lambda: all(s.log_path.exists() and s.log_path.read_text() for s in (one, two)))
    pids = [child.pid for child in supervisor.children]
    begun = time.monotonic()
    await supervisor.stop(1.0)
    assert time.monotonic() - begun < 5.0 + HELD_UP_S
    assert not any(pid is None or psutil.pid_exists(pid) for pid in pids)


def test_children_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
from precast.cli.supervisor import ChildSpec, Supervisor
async def main():
    spec = ChildSpec(name="c", command=(sys.executable, "-c", {SLEEPER!r}), log_path=Path("c.log"))
    supervisor = Supervisor([spec])
    supervisor.start(["c"])
    while not Path("c.log").exists() or not Path("c.log").read_text():
        await asyncio.sleep(0.02)
    print(supervisor.children[0].pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + DEADLINE_S
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "the child outlived its parent"
        time.sleep(0.02)


def test_time_left_comes_from_the_captures_so_far() -> None:
    clock = CaptureClock()
    assert clock.update(0, 4, 100.0).left_s is None
    assert clock.update(1, 4, 130.0).left_s == pytest.approx(90.0)
    assert clock.update(1, 4, 140.0).left_s == pytest.approx(80.0)
    assert clock.update(3, 4, 160.0).left_s == pytest.approx(20.0)
    assert clock.update(4, 4, 180.0).left_s == 0.0
    # recaptured after a restart: begin again
    assert clock.update(0, 4, 200.0).left_s is None
