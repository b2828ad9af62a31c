"""How much a worker has to do, as far as this gateway knows.

Heartbeats and leases lag by a second or more, so the gateway adds what it has sent since.
``reserve`` and ``release`` are apart from the choice: who sends a request reserves, and releases in
all events.
"""

from collections import deque
from typing import Final

_WINDOWS: Final = 4
"""Observations over which peaks are kept: twice the age that a lease can have when it is read."""
LEAST_WORK: Final = 16
"""Tokens that a running request counts for at least: what is left of it isn't known."""


class Load:
    """One worker's load: what it says itself, corrected by what this gateway knows better.

    It counts our own requests too, those that have ended meanwhile included. So the most that we
    had there lately is taken off it: the rest are other gateways' requests.
    """

    def __init__(self) -> None:
        self._others = 0
        self._peak = 0
        self._peaks: deque[int] = deque(maxlen=_WINDOWS)
        self.reserved = 0
        """Requests of this gateway that are there now."""
        self.last_chosen = 0
        self.left = 0
        """Tokens of them that are still to be computed."""

    @property
    def total(self) -> int:
        """Requests."""
        return self._others + self.reserved

    def work(self, usual: float) -> int:
        """Tokens to be computed; ``usual``: of a request of which nothing else is known."""
        return self.left + LEAST_WORK * self.reserved + round(usual * self._others)

    def observe(self, reported: int) -> None:
        """A fresh lease or heartbeat says that ``reported`` requests run or wait."""
        self._peaks.append(self._peak)
        self._others = max(0, reported - max(self._peaks))
        self._peak = self.reserved

    def reserve(self, sequence: int, work: int = 0) -> None:
        self.reserved += 1
        self.left += work
        self._peak = max(self._peak, self.reserved)
        self.last_chosen = sequence

    def release(self, left: int = 0) -> None:
        """A request has ended, with so much of its work undone."""
        assert self.reserved > 0, "released more often than reserved"
        self.reserved -= 1
        self.left -= left


class UsualOutput:
    """How many tokens outputs have: an average of the last ones."""

    FIRST: Final = 128
    WEIGHT: Final = 0.05
    """Of the newest."""

    def __init__(self) -> None:
        self.tokens = float(self.FIRST)

    def observe(self, tokens: int) -> None:
        self.tokens += self.WEIGHT * (tokens - self.tokens)

    def expected(self, most: int) -> int:
        """Of a request that may have so many."""
        return min(most, max(1, round(self.tokens)))
