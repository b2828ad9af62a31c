"""Which worker gets a request: a pure policy over candidates, and the counts that feed it.

Leases lag by a second or more, so the gateway adds what it has sent since. ``reserve`` and
``release`` are apart from the choice: who sends a request reserves, and releases in all events.
"""

from collections import deque
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Final

_WINDOWS: Final = 4
"""Observations over which peaks are kept: twice the age that a lease can have when it is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What the policy knows of a worker."""

    worker_id: str
    tier: int
    """0: ready. Higher tiers are chosen only where no lower one is left."""
    load: int
    """Requests that run or wait there."""
    capacity: int
    """Requests that it runs at once."""
    max_context_length: int
    """Tokens."""
    last_chosen: int
    """Sequence number of the last choice of this worker; 0 if never."""


def choose(
    candidates: Iterable[Candidate], *, tokens: int = 0, exclude: Container[str] = ()
) -> Candidate | None:
    """The least loaded candidate, relative to its capacity, that can hold ``tokens``.

    Among equals the one that was chosen longest ago. None if no candidate fits.
    """
    fitting = (
        candidate
        for candidate in candidates
        if candidate.max_context_length >= tokens and candidate.worker_id not in exclude
    )
    return min(fitting, key=_rank, default=None)


def _rank(candidate: Candidate) -> tuple[int, float, int, str]:
    load = candidate.load / max(1, candidate.capacity)
    return candidate.tier, load, candidate.last_chosen, candidate.worker_id


class Load:
    """One worker's load: what its lease says, corrected by what this gateway knows better.

    The lease counts our own requests too, those that have ended meanwhile included. So the most
    that we had there lately is taken off it: the rest are other gateways' requests.
    """

    def __init__(self) -> None:
        self._others = 0
        self._peak = 0
        self._peaks: deque[int] = deque(maxlen=_WINDOWS)
        self.reserved = 0
        """Requests of this gateway that are there now."""
        self.last_chosen = 0

    @property
    def total(self) -> int:
        return self._others + self.reserved

    def observe(self, reported: int) -> None:
        """A fresh lease says that ``reported`` requests run or wait."""
        self._peaks.append(self._peak)
        self._others = max(0, reported - max(self._peaks))
        self._peak = self.reserved

    def reserve(self, sequence: int) -> None:
        self.reserved += 1
        self._peak = max(self._peak, self.reserved)
        self.last_chosen = sequence

    def release(self) -> None:
        assert self.reserved > 0, "released more often than reserved"
        self.reserved -= 1
