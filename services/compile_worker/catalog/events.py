"""Changes of graphs, handed to whoever watches in this process."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from services.compile_worker.catalog.entry import GraphRecord


class Subscription:
    """What one watcher has not seen yet: at most the latest state of each key, so it is bounded."""

    def __init__(self) -> None:
        self._unseen: dict[str, GraphRecord] = {}
        self._changed = asyncio.Event()

    def post(self, record: GraphRecord) -> None:
        self._unseen[record.key] = record
        self._changed.set()

    async def next(self) -> GraphRecord:
        """The next change, waiting for one if need be."""
        await self._changed.wait()
        key = next(iter(self._unseen))
        record = self._unseen.pop(key)
        if not self._unseen:
            self._changed.clear()
        return record


class Changes:
    """A bus from the index to watchers."""

    def __init__(self) -> None:
        self._subscriptions: set[Subscription] = set()

    def post(self, record: GraphRecord) -> None:
        for subscription in self._subscriptions:
            subscription.post(record)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        subscription = Subscription()
        self._subscriptions.add(subscription)
        try:
            yield subscription
        finally:
            self._subscriptions.discard(subscription)
