"""Running a service until it is told to stop."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence

from precast.system.alive import keep_beating

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def _nothing() -> None:
    return


async def run_until_stopped(
    tasks: Sequence["asyncio.Task[None]"],
    before_stop: Callable[[], Awaitable[None]] = _nothing,
) -> None:
    """Wait for SIGTERM or SIGINT, then for ``before_stop``; the tasks are cancelled at the end.

    A task that ends raises what it failed with, and ends the service.
    """
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    stopped = asyncio.create_task(stop.wait())
    beating = asyncio.create_task(keep_beating())
    try:
        done, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            task.result()
        await before_stop()
    finally:
        stopped.cancel()
        beating.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
