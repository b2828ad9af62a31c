"""A circuit breaker for each worker: one that keeps failing is spared until it has proved itself.

Failures in a row open it. While it is open, the worker gets only what no other worker can take.
After a pause it gets one request: if that is well, everything is as before; if not, the next pause
is twice as long.
"""

import time
from collections.abc import Callable
from typing import Final

from precast.system.backoff import Backoff

OPENS_AFTER: Final = 3
"""Failures in a row."""
PAUSES: Final = Backoff(first_s=1.0, max_s=30.0)


class Breaker:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        """When the pause ends."""

    def succeeded(self) -> None:
        """A request has ended as it should."""
        self._failures = 0

    def failed(self) -> None:
        """The worker has failed at a request, or was lost with some."""
        self._failures += 1
        if self._failures >= OPENS_AFTER:
            pause_s = PAUSES.wait_s(self._failures - OPENS_AFTER + 1)
            self._until = self._clock() + pause_s

    def is_open(self, running: int) -> bool:
        """Whether to spare the worker, which has so many requests now."""
        if self._failures < OPENS_AFTER:
            return False
        return running > 0 or self._clock() < self._until
