"""When a process counts as hung by its heartbeats."""

import asyncio
import os

import pytest

from precast.system import alive
from precast.system.alive import HUNG_S, STARTING_S, Pulse


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(alive, "time", clock)
    return clock


def silent_for(pulse: Pulse, clock: Clock, limit: int = 200) -> int:
    """Seconds until it counts as hung, looked at every second."""
    for second in range(1, limit):
        clock.now += 1.0
        if pulse.hung():
            return second
    raise AssertionError("it never counts as hung")


def test_silence_after_a_beat_is_a_hang_and_before_it_a_start(clock: Clock) -> None:
    pulse = Pulse()
    assert silent_for(pulse, clock) == STARTING_S + 1
    os.write(pulse.child_end, b"...")
    assert not pulse.hung()
    assert silent_for(pulse, clock) == HUNG_S + 1
    pulse.started()
    pulse.close()


def test_who_was_kept_from_looking_blames_nobody(clock: Clock) -> None:
    pulse = Pulse()
    os.write(pulse.child_end, b".")
    assert not pulse.hung()
    clock.now += 60.0
    assert not pulse.hung()
    assert silent_for(pulse, clock) <= HUNG_S
    pulse.started()
    pulse.close()


async def test_a_loop_beats_and_its_children_don_t(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse = Pulse()
    os.set_inheritable(pulse.child_end, True)
    monkeypatch.setenv(alive.ENVIRONMENT, str(pulse.child_end))
    monkeypatch.setattr(alive, "INTERVAL_S", 0.01)
    beating = asyncio.create_task(alive.keep_beating())
    async with asyncio.timeout(5):
        while pulse._limit_s != HUNG_S:
            pulse.hung()
            await asyncio.sleep(0.01)
    assert alive.ENVIRONMENT not in os.environ
    assert not os.get_inheritable(pulse.child_end)
    beating.cancel()
    pulse.started()
    pulse.close()


async def test_nobody_watches_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(alive.ENVIRONMENT, raising=False)
    async with asyncio.timeout(5):
        await alive.keep_beating()  # nothing wakes the process for it
