"""Waits that an event or the time ends."""

import asyncio
import time

from precast.system.wakeup import Wakeup

LONG_S = 60.0


async def test_the_time_ends_a_wait() -> None:
    await Wakeup().wait(0.001)


async def test_what_was_set_before_ends_the_next_wait_and_no_other() -> None:
    wakeup, begun = Wakeup(), time.monotonic()
    wakeup.set()
    wakeup.set()
    await wakeup.wait(LONG_S)
    assert time.monotonic() - begun < LONG_S / 2
    waiting = asyncio.create_task(wakeup.wait(LONG_S))
    await asyncio.sleep(0)
    assert not waiting.done()
    wakeup.set()
    wakeup.set()  # before it has run
    await asyncio.wait_for(waiting, LONG_S / 2)
    await wakeup.wait(0.0)


async def test_a_wait_that_is_cancelled_leaves_nothing() -> None:
    wakeup = Wakeup()
    waiting = asyncio.create_task(wakeup.wait(LONG_S))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    wakeup.set()
    await asyncio.wait_for(wakeup.wait(LONG_S), LONG_S / 2)
