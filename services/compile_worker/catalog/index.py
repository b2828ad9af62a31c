"""The index of graphs: here in memory, and in Redis for every compile worker.

Each change is written to the hash ``precast:graphs`` and announced on ``precast:graphs:changed``.
Neither is relied on: every few seconds a counter of the writes is compared. Where it has changed or
is gone, a reconciliation takes over what was missed, and puts back what Redis has lost. With Redis
away the index goes on from memory.
"""

import asyncio
from typing import Any, Final

import msgspec
import redis.asyncio

from precast.errors import RegistryUnavailable
from precast.fleet.leases import REDIS_FAILURES, bounded
from precast.graphs.key import is_key
from precast.log import get_logger
from precast.system.backoff import Backoff
from services.compile_worker.catalog.entry import GraphRecord, Phase, merge
from services.compile_worker.catalog.events import Changes

log = get_logger(__name__)

HASH: Final = "precast:graphs"
COUNTER: Final = "precast:graphs:writes"
"""Goes up with each write to the hash, and is gone when Redis has lost it."""
CHANNEL: Final = "precast:graphs:changed"
RECONCILE_INTERVAL_S: Final = 2.0
MAX_UNPUBLISHED: Final = 4096
_RETRY: Final = Backoff(first_s=0.5, max_s=5.0)
_LISTEN_S: Final = 0.5

_decoder: Final = msgspec.json.Decoder(GraphRecord)


class GraphIndex:
    """Records by key. ``changes`` tells watchers in this process."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        self._client = client
        self._records: dict[str, GraphRecord] = {}
        self._exchanged: bytes | None = None
        """The counter of writes at the last reconciliation."""
        self._unshared = True
        """Whether there may be records here that Redis doesn't have."""
        self.changes = Changes()

    def get(self, key: str) -> GraphRecord | None:
        return self._records.get(key)

    def records(self) -> list[GraphRecord]:
        """All records, in a stable order."""
        return sorted(self._records.values(), key=lambda record: record.key)

    def restore(self, record: GraphRecord) -> None:
        """Take a record into memory alone; the next reconciliation shares it."""
        self._unshared = True
        self._merge(record)

    async def put(self, record: GraphRecord) -> None:
        """Store a change and tell everybody. Doesn't fail: what Redis misses now it gets later."""
        if record == self._records.get(record.key):
            return
        self._merge(record)
        try:
            await self._share(self._records[record.key])
            await self._trim()
        except RegistryUnavailable as error:
            self._unshared = True
            log.warning("graph index not shared", key=record.key, reason=str(error))

    async def reconcile(self) -> None:
        """Exchange with Redis what one side knows and the other doesn't, or only in an older
        version.

        Raises ``RegistryUnavailable``.
        """
        self._exchanged = await self._command("GET", COUNTER)
        shared = {record.key: record for record in _parse_all(await self._command("HVALS", HASH))}
        for record in shared.values():
            self._merge(record)
        for key in list(self._records):  # more may come, and some change, while Redis answers
            present = self._records.get(key)
            if present and shared.get(key) != present:
                await self._share(present)

    async def reconcile_if_changed(self) -> None:
        """``reconcile``, unless nobody has written since: that is seen in a counter."""
        counter = await self._command("GET", COUNTER)
        if counter is None or counter != self._exchanged or self._unshared:
            self._unshared = False
            await self.reconcile()

    async def run(self) -> None:
        """Listen for changes and reconcile, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen())
            tasks.create_task(self._reconcile_often())

    async def _reconcile_often(self) -> None:
        reachable = True
        while True:
            try:
                await self.reconcile_if_changed()
                reachable = True
            except RegistryUnavailable as error:
                self._unshared = True
                if reachable:
                    log.warning("graph index is on its own", reason=str(error))
                reachable = False
            await asyncio.sleep(RECONCILE_INTERVAL_S)

    async def _listen(self) -> None:
        failures = 0
        while True:
            try:
                async with self._client.pubsub() as pubsub:
                    await pubsub.subscribe(CHANNEL)
                    failures = 0
                    await self._receive(pubsub)
            except REDIS_FAILURES:
                failures += 1
                await asyncio.sleep(_RETRY.wait_s(failures))

    async def _receive(self, pubsub: Any) -> None:
        while True:
            message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=_LISTEN_S)
            for record in _parse_all([message["data"]] if message else []):
                self._merge(record)

    def _merge(self, record: GraphRecord) -> None:
        present = self._records.get(record.key)
        merged = merge(present, record) if present else record
        if merged != present:
            self._records[record.key] = merged
            self.changes.post(merged)

    async def _share(self, record: GraphRecord) -> None:
        raw = msgspec.json.encode(record)
        await self._command("HSET", HASH, record.key, raw)
        await self._command("INCR", COUNTER)
        await self._command("PUBLISH", CHANNEL, raw)

    async def _trim(self) -> None:
        """Forget the oldest graphs that were asked for and never published, beyond the bound."""
        unpublished = [r for r in self._records.values() if r.phase is not Phase.PUBLISHED]
        excess = len(unpublished) - MAX_UNPUBLISHED
        for record in sorted(unpublished, key=lambda r: r.updated_at)[: max(excess, 0)]:
            del self._records[record.key]
            await self._command("HDEL", HASH, record.key)

    async def _command(self, *arguments: Any) -> Any:
        async with bounded():
            return await self._client.execute_command(*arguments)  # type: ignore[no-untyped-call]


def _parse_all(rows: list[bytes]) -> list[GraphRecord]:
    """Records of this version's form; what another version wrote is skipped."""
    records = []
    for row in rows:
        try:
            record = _decoder.decode(row)
        except msgspec.DecodeError as error:
            log.warning("index row ignored", reason=str(error))
            continue
        if is_key(record.key):
            records.append(record)
        else:
            log.warning("index row ignored", reason=f"{record.key[:64]!r} is no graph key")
    return records
