"""Keeps the store within its bound and its artifacts whole, now and then and when asked to."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from precast.errors import ArtifactRejected, GraphNotFound, RegistryUnavailable, StoreUnavailable
from precast.fleet.leases import Registry
from precast.graphs.artifacts.store import Holding
from precast.graphs.key import is_key
from precast.log import get_logger
from services.compile_worker.catalog.gc_policy import Removal, plan
from services.compile_worker.graphs import Graphs
from services.compile_worker.metrics import Metrics

log = get_logger(__name__)

POLL_S: Final = 10.0
IN_USE_S: Final = 60.0
"""How long a graph counts as in use after it was last seen in a lease: longer than a worker's
restart. What this process has not seen yet counts from its start."""
TOUCH_S: Final = 3600.0
"""How often the use of a graph that workers run is noted in the store."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What a collection removed, or would remove."""

    removals: list[Removal]
    before: int
    """Bytes in the store."""

    @property
    def after(self) -> int:
        return self.before - sum(removal.holding.size for removal in self.removals)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """An artifact that was put aside."""

    key: str
    version: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Scrubbed:
    """What a scrub found."""

    checked: int
    damages: list[Damage]


@dataclass(kw_only=True)
class Upkeep:
    graphs: Graphs
    registry: Registry
    metrics: Metrics
    max_bytes: int
    """Of all artifacts in the store."""
    scrub_interval_s: float
    in_use_s: float = IN_USE_S
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, float] = field(default_factory=dict)
    """When each key was last seen in a lease."""
    _touched: dict[tuple[str, int], float] = field(default_factory=dict)
    _since: float = 0.0
    """Since when leases were looked at without a break."""
    _again_at: float | None = None
    """When to collect again without a publication."""
    _busy: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._since = self.clock()

    async def run(self) -> None:
        """Collect after publications and scrub at intervals, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_collecting())
            tasks.create_task(self._keep_scrubbing())

    async def collect(self, *, dry_run: bool) -> Collected:
        """Remove what is too much. Raises ``StoreUnavailable``."""
        async with self._busy:
            await self._notice_use()
            store = self.graphs.store
            holdings = await asyncio.to_thread(store.holdings)
            in_use = {holding.key for holding in holdings if self._in_use(holding)}
            removals = await asyncio.to_thread(
                plan, holdings, self.graphs.versions.look, in_use, self.max_bytes
            )
            found = Collected(removals=removals, before=sum(h.size for h in holdings))
            if not dry_run:
                await self._remove(removals)
            self.metrics.store_bytes.set(found.before if dry_run else found.after)
        self._note_excess(found.after)
        return found

    async def scrub(self) -> Scrubbed:
        """Read every artifact and put aside what isn't what was signed. Raises
        ``StoreUnavailable``."""
        async with self._busy:
            holdings = await asyncio.to_thread(self.graphs.store.holdings)
            damages = []
            for holding in holdings:
                reason = await self._fault(holding.key, holding.version)
                if reason:
                    damages.append(Damage(key=holding.key, version=holding.version, reason=reason))
            await self.graphs.restore()  # what others have put into the store
        log.info("store scrubbed", artifacts=len(holdings), damaged=len(damages))
        return Scrubbed(checked=len(holdings), damages=damages)

    def _note_excess(self, size: int) -> None:
        """Graphs that are in use now may not be later: then the rest has to go."""
        over = size > self.max_bytes
        if over and self._again_at is None:
            log.warning("store is over its bound", bytes=size, bound=self.max_bytes)
        self._again_at = self.clock() + self.in_use_s if over else None

    async def _keep_collecting(self) -> None:
        self._again_at = self.clock()  # the bound may have been lowered
        while True:
            try:
                await self._notice_use()
                late = self._again_at is not None and self.clock() >= self._again_at
                if late or self.graphs.published.is_set():
                    self.graphs.published.clear()
                    await self.collect(dry_run=False)
            except (StoreUnavailable, OSError) as error:
                self._again_at = self.clock() + POLL_S
                log.warning("store not collected", reason=str(error))
            try:
                async with asyncio.timeout(POLL_S):
                    await self.graphs.published.wait()
            except TimeoutError:
                pass

    async def _keep_scrubbing(self) -> None:
        while True:
            await asyncio.sleep(self.scrub_interval_s)
            try:
                await self.scrub()
            except (StoreUnavailable, OSError) as error:
                log.warning("store not scrubbed", reason=str(error))

    async def _notice_use(self) -> None:
        """Look which graphs workers run. While that can't be seen, all count as in use."""
        try:
            leases = await self.registry.decode_workers()
        except RegistryUnavailable:
            self._since = self.clock()
            return
        running = {
            pair
            for lease in leases
            for graph in lease.graphs
            for pair in zip(graph.keys, graph.versions, strict=False)
            if is_key(pair[0])
        }
        now = self.clock()
        for key, version in running:
            self._seen[key] = now
            if now - self._touched.get((key, version), -TOUCH_S) >= TOUCH_S:
                await asyncio.to_thread(self.graphs.store.touch, key, version)
                self._touched[key, version] = now

    def _in_use(self, holding: Holding) -> bool:
        """Whether workers run its graph, or may be about to: it was just published or fetched."""
        last = max(self._seen.get(holding.key, self._since), self._since)
        return min(self.clock() - last, time.time() - holding.used_at) < self.in_use_s

    async def _remove(self, removals: list[Removal]) -> None:
        for removal in removals:
            holding = removal.holding
            await self.graphs.remove(holding.key, holding.version, removal.reason)
            self.metrics.removed.inc()

    async def _fault(self, key: str, version: int) -> str:
        """What is wrong with an artifact, which is put aside then; "" if nothing."""
        try:
            await asyncio.to_thread(self.graphs.versions.check, key, version)
        except GraphNotFound:  # removed meanwhile
            return ""
        except ArtifactRejected as error:
            self.metrics.scrubbed.labels("damaged").inc()
            await self.graphs.put_aside(key, version, str(error))
            return str(error)
        self.metrics.scrubbed.labels("good").inc()
        return ""
