"""A wait for an event or for some time, whichever is first, by one task.

Nearly all waits of a service last their time. ``asyncio.timeout`` around an event then costs a
cancelled task and two exceptions, three times what this does.
"""

import asyncio


class Wakeup:
    def __init__(self) -> None:
        self._set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Ends the wait, or the next one at once."""
        self._set = True
        self._release()

    async def wait(self, timeout_s: float) -> None:
        """Until it is set, or the time is over; then it is set no more."""
        if not self._set:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._release)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        self._set = False

    def _release(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
