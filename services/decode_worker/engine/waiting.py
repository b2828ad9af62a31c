"""Sequences that wait for a slot: higher priorities first, and among equals who came first."""

from collections import deque
from collections.abc import Iterator

from services.decode_worker.engine.sequence import Sequence


class WaitingQueue:
    def __init__(self) -> None:
        self._by_priority: dict[int, deque[Sequence]] = {}
        """None of them empty, the highest priority first."""
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """In the order in which they get slots."""
        for equals in list(self._by_priority.values()):
            yield from list(equals)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._by_priority.get(sequence.priority, ())

    def append(self, sequence: Sequence) -> None:
        """Behind its equals."""
        self._equals(sequence.priority).append(sequence)
        self._size += 1

    def put_back(self, sequence: Sequence) -> None:
        """Before its equals: it had a slot."""
        self._equals(sequence.priority).appendleft(sequence)
        self._size += 1

    @property
    def first(self) -> Sequence:
        """Who gets the next slot; there must be one."""
        return next(iter(self._by_priority.values()))[0]

    def remove(self, sequence: Sequence) -> None:
        equals = self._by_priority[sequence.priority]
        equals.remove(sequence)
        self._size -= 1
        if not equals:
            del self._by_priority[sequence.priority]

    def _equals(self, priority: int) -> deque[Sequence]:
        equals = self._by_priority.get(priority)
        if equals is None:
            equals = self._by_priority[priority] = deque()
            self._by_priority = dict(sorted(self._by_priority.items(), reverse=True))
        return equals
