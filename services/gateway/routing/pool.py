"""The live decode workers: found through their leases, each reached by one multiplexed stream."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Container, Iterator
from contextlib import asynccontextmanager
from typing import Final

from precast.errors import ModelNotFound, RegistryUnavailable, WorkerUnavailable
from precast.fleet.leases import DecodeLease, Registry
from precast.log import get_logger
from precast.proto.decode.v1.decode_service_pb2 import StartGeneration
from services.gateway.routing.connection import WorkerLink
from services.gateway.routing.event_queue import Inbox
from services.gateway.routing.policy import Candidate, Load, choose

log = get_logger(__name__)

MISSING_GRACE_S: Final = 2.0
"""A worker is given up only when its lease has been missing this long in answers of Redis. A Redis
that comes back empty lacks every lease until the workers' next beat."""


class Worker:
    """A decode worker as the gateway sees it."""

    def __init__(self, lease: DecodeLease) -> None:
        self.lease = lease
        self.link = WorkerLink(lease.worker_id, lease.address)
        self.load = Load()
        self.missing_since: float | None = None

    @property
    def ready(self) -> bool:
        return self.lease.state == "ready" and self.missing_since is None

    @property
    def gone(self) -> bool:
        """Its lease has ended; only requests that were there already may go on."""
        missing = self.missing_since
        return missing is not None and time.monotonic() - missing >= MISSING_GRACE_S

    def observe(self, lease: DecodeLease) -> None:
        self.missing_since = None
        self.lease = lease
        self.load.observe(lease.running + lease.waiting)

    def candidate(self) -> Candidate | None:
        """None where it takes no requests."""
        if self.gone or self.lease.state not in ("ready", "restarting"):
            return None
        # A restarting worker queues what it gets, and a link that failed just now may fail again:
        # both are better than no worker.
        tier = 2 * self.link.suspect + (not self.ready)
        return Candidate(
            worker_id=self.lease.worker_id,
            tier=tier,
            load=self.load.total,
            capacity=self.lease.max_batch_size,
            max_context_length=self.lease.max_context_length,
            last_chosen=self.load.last_chosen,
        )


class WorkerPool:
    """Keeps the list of workers fresh and sends requests to them."""

    def __init__(self, registry: Registry, *, refresh_s: float) -> None:
        self._registry = registry
        self._refresh_s = refresh_s
        self._workers: dict[str, Worker] = {}
        self._first_seen: dict[str, float] = {}
        self._sequence = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._reachable = True

    async def start(self) -> None:
        """Read the list once, then keep reading it."""
        await self.refresh()
        self._task = asyncio.create_task(self._run(), name="worker discovery")

    async def close(self) -> None:
        """Stop reading and close all streams: workers abort what is left on them."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        links = [worker.link for worker in self._workers.values()]
        self._workers.clear()
        await asyncio.gather(*(link.close() for link in links))

    @property
    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    @property
    def models(self) -> dict[str, int]:
        """Names of the models that live workers serve, and when each was first seen (Unix, s)."""
        names = sorted({w.lease.model for w in self._workers.values() if not w.gone})
        return {name: int(self._first_seen[name]) for name in names}

    def max_context_length(self, model: str) -> int:
        """Tokens that the largest worker of this model takes.

        Raises ``ModelNotFound`` for a model that was never seen, ``WorkerUnavailable`` for one
        whose workers are gone.
        """
        lengths = [worker.lease.max_context_length for worker in self._serving(model)]
        if not lengths:
            raise self._none_serves(model)
        return max(lengths)

    def pick(self, model: str, *, tokens: int, exclude: Container[str] = ()) -> Worker:
        """The worker for a request of ``tokens`` in all. Raises as ``max_context_length``."""
        candidates = [worker.candidate() for worker in self._serving(model)]
        usable = (candidate for candidate in candidates if candidate is not None)
        choice = choose(usable, tokens=tokens, exclude=exclude)
        if choice is None:
            raise self._none_serves(model)
        return self._workers[choice.worker_id]

    @asynccontextmanager
    async def running(
        self, worker: Worker, request_id: str, start: StartGeneration
    ) -> AsyncIterator[Inbox]:
        """The request runs at the worker while in here; on leaving, its slot there is freed.

        Raises ``WorkerUnavailable`` or ``Overloaded`` if it can't be sent.
        """
        worker.load.reserve(next(self._sequence))
        try:
            async with worker.link.running(request_id, start) as inbox:
                yield inbox
        finally:
            worker.load.release()

    def _serving(self, model: str) -> Iterator[Worker]:
        live = (worker for worker in self._workers.values() if not worker.gone)
        return (worker for worker in live if worker.lease.model == model)

    def _none_serves(self, model: str) -> Exception:
        if model in self._first_seen:
            return WorkerUnavailable(f"No worker is ready to serve the model {model!r}.")
        return ModelNotFound(f"The model {model!r} does not exist.")

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            await self.refresh()

    async def refresh(self) -> None:
        """Read the leases. While Redis is down, the last-known workers stay."""
        try:
            leases = await self._registry.decode_workers()
        except RegistryUnavailable as error:
            if self._reachable:
                log.warning("registry lost; keeping the known workers", reason=str(error))
            self._reachable = False
            return
        except Exception:  # discovery must not silently end
            log.exception("worker discovery failed")
            return
        if not self._reachable:
            log.info("registry is back")
        self._reachable = True
        await self._apply({lease.worker_id: lease for lease in leases})

    async def _apply(self, leases: dict[str, DecodeLease]) -> None:
        for worker_id, lease in leases.items():
            self._first_seen.setdefault(lease.model, time.time())
            if worker_id not in self._workers:
                log.info("worker found", worker_id=worker_id, address=lease.address)
                self._workers[worker_id] = Worker(lease)
            self._workers[worker_id].observe(lease)
        for worker in [w for i, w in self._workers.items() if i not in leases]:
            await self._miss(worker)

    async def _miss(self, worker: Worker) -> None:
        """The worker has no lease: wait a little, then let its requests end, then forget it."""
        worker.missing_since = worker.missing_since or time.monotonic()
        if worker.gone and (worker.link.idle or worker.link.suspect):
            log.info("worker gone", worker_id=worker.lease.worker_id)
            del self._workers[worker.lease.worker_id]
            await worker.link.close()
