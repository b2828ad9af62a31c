"""How many requests run in the gateways of one start, which share a port and a bound."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager


class InFlight:
    """A count for each process, in memory that forks share."""

    def __init__(self, processes: int = 1) -> None:
        self._counts = memoryview(mmap.mmap(-1, 8 * processes)).cast("q")
        self._mine = 0

    def begin(self, index: int) -> None:
        """This process is the one of this number; one that ended before it has left nothing."""
        self._mine = index
        self._counts[index] = 0

    @property
    def mine(self) -> int:
        """Requests in this process."""
        return self._counts[self._mine]

    @property
    def all(self) -> int:
        """In all of them. Two that begin at the same moment may not see each other."""
        return sum(self._counts)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self._counts[self._mine] += 1
        try:
            yield
        finally:
            self._counts[self._mine] -= 1
