"""Heartbeats between a process and the one that watches over it, through a pipe.

The watcher starts its child with the number of the pipe's end in ``ENVIRONMENT``, and the child's
event loop writes a byte each second. A process that is stopped, or whose loop hangs, is silent; one
that has much to do, or many connections, is not. Without the variable nobody watches.
"""

import asyncio
import contextlib
import os
import time
from typing import Final

ENVIRONMENT: Final = "PRECAST_ALIVE_FD"
INTERVAL_S: Final = 1.0
HUNG_S: Final = 8.0
"""Silence after which a process that has beaten before counts as hung."""
STARTING_S: Final = 120.0
"""The same for one that has not: it imports and reads."""


def descriptor() -> int | None:
    """The pipe's end that we beat on, which our children don't get; None if nobody watches."""
    number = os.environ.pop(ENVIRONMENT, None)
    if number is None:
        return None
    os.set_inheritable(int(number), False)
    os.set_blocking(int(number), False)
    return int(number)


def beat(pipe: int | None) -> None:
    """Say that this process is alive."""
    if pipe is not None:
        with contextlib.suppress(OSError):  # full: the watcher is late; closed: it is gone
            os.write(pipe, b".")


async def keep_beating() -> None:
    """Say it once a second, until cancelled; at once over where nobody watches."""
    pipe = descriptor()
    while pipe is not None:
        beat(pipe)
        await asyncio.sleep(INTERVAL_S)


class Pulse:
    """The watcher's side: when a child was last heard of."""

    def __init__(self) -> None:
        self._reading, self.child_end = os.pipe()
        os.set_blocking(self._reading, False)
        self._heard = self._looked = time.monotonic()
        self._limit_s = STARTING_S

    def started(self) -> None:
        """The child has its end."""
        os.close(self.child_end)

    def hung(self) -> bool:
        """Whether it was silent for too long; to be asked about once a second."""
        now = time.monotonic()
        late = now - self._looked - 2 * INTERVAL_S
        if late > 0:  # we were kept from looking: perhaps the child was kept from beating
            self._heard += late
        self._looked = now
        with contextlib.suppress(BlockingIOError):
            while os.read(self._reading, 4096):
                self._heard, self._limit_s = now, HUNG_S
        return now - self._heard > self._limit_s

    def close(self) -> None:
        os.close(self._reading)
