"""The decode workers: found through their leases, each kept in touch with by a connection."""

import asyncio
import itertools
import time
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from typing import Final

from precast.errors import (
    ModelNotFound,
    PrecastError,
    RegistryUnavailable,
    WorkerUnavailable,
)
from precast.fleet.leases import DecodeLease, Registry
from precast.log import get_logger
from precast.proto.decode.v1.decode_service_pb2 import StartGeneration
from precast.rpc.tls import Tls
from precast.system.backoff import Backoff
from services.gateway.routing.connection import Place
from services.gateway.routing.load import UsualOutput
from services.gateway.routing.policy import Demand, choose
from services.gateway.routing.prefixes import Hashes
from services.gateway.routing.sessions import Sessions
from services.gateway.routing.worker import Worker

log = get_logger(__name__)

STOPPING: Final = "The gateway is shutting down."
_MAX_PAUSE_S: Final = 2.0
_OFTEN: Final = 4
"""Times as often as usual the list is read while it may tell what became of a worker. Else it is
not: what reads it has left the caches, and puts out of them what each token needs."""
_MAX_MODELS: Final = 4096


class WorkerPool:
    """Keeps the list of workers fresh and chooses among them.

    Workers are kept by address: one that is restarted at its old address is the same place.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        refresh_s: float,
        expected_models: Iterable[str] = (),
        tls: Tls | None = None,
    ) -> None:
        """A worker of an ``expected_models`` may not have a lease yet. ``tls``: what workers are
        shown, and who they must be."""
        self._tls = tls
        self._registry = registry
        self._refresh_s, self._soon_s = refresh_s, refresh_s / _OFTEN
        self._pause = Backoff(first_s=self._soon_s, max_s=max(self._soon_s, _MAX_PAUSE_S))
        self._workers: dict[str, Worker] = {}
        self._first_seen: dict[str, float] = {}
        self._expected = frozenset(expected_models)
        self._sequence = itertools.count(1)
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._failures = 0
        self.usual = UsualOutput()
        self.sessions = Sessions()
        self.stopping = False
        """Whether no more requests are taken."""

    async def start(self) -> None:
        """Read the list once, then keep reading it."""
        await self.refresh()
        self._task = asyncio.create_task(self._run(), name="worker discovery")

    async def close(self) -> None:
        """Stop reading and close all streams: workers abort what is left on them."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.end_requests()
        self._workers.clear()

    async def end_requests(self) -> None:
        """Take no more requests, and end those that run with an error that says why."""
        self.stopping = True
        reason = WorkerUnavailable(STOPPING)
        await asyncio.gather(*(worker.close(reason) for worker in self._workers.values()))
        self._on_change()

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if not worker.gone]

    @property
    def models(self) -> dict[str, int]:
        """Names of the models that live workers serve, and when each was first seen (Unix, s)."""
        names = sorted({name for worker in self.workers for name in worker.names})
        return {name: int(self._first_seen.get(name, 0.0)) for name in names}

    @property
    def bases(self) -> frozenset[str]:
        """Names of the models, without adapters, that live workers serve or are expected to."""
        return self._expected | {worker.lease.model for worker in self.workers}

    @property
    def has_served(self) -> bool:
        """Whether a worker was ever seen."""
        return bool(self._first_seen)

    def base_of(self, model: str) -> str:
        """The model whose adapter this is; itself if it is none, or not known."""
        return next((worker.lease.model for worker in self._serving(model)), model)

    def max_context_length(self, model: str) -> int:
        """Tokens that the largest worker of this model takes.

        Raises ``ModelNotFound`` for a model that was never seen, ``WorkerUnavailable`` for one
        whose workers are gone, or have yet to come.
        """
        lengths = [worker.lease.max_context_length for worker in self._serving(model)]
        if not lengths:
            raise self._none_serves(model)
        return max(lengths)

    def reaches(self, model: str) -> bool:
        """Whether a worker of the model takes requests."""
        return any(worker.ready and worker.connection.up for worker in self._serving(model))

    def reads_as(self, model: str, digest: str) -> bool:
        """Whether a worker has the tokenizer of this digest, as far as is known."""
        workers = self._serving(model)
        return not workers or any(worker.reads_as(digest) for worker in workers)

    def tokenizers_differ(self, model: str, digest: str) -> WorkerUnavailable:
        """What to answer where no worker has the gateway's tokenizer."""
        workers = self._serving(model)
        message = f"The model files of {model!r} differ between the gateway and its workers."
        ids = [worker.worker_id for worker in workers]
        log.error("model files differ", model=model, gateway_digest=digest, worker_ids=ids)
        return WorkerUnavailable(message)

    def pick(
        self,
        model: str,
        demand: Demand,
        *,
        exclude: Container[str] = (),
        tokenizer_digest: str = "",
        hashes: Hashes = (),
    ) -> Worker:
        """The worker for a request, whose prompt has blocks of these hashes.

        Raises as ``max_context_length``.
        """
        if self.stopping:
            raise WorkerUnavailable(STOPPING)
        usable = {worker.worker_id: worker for worker in self._serving(model)}
        found = (worker.candidate(tokenizer_digest, hashes) for worker in usable.values())
        candidates = [candidate for candidate in found if candidate is not None]
        choice = choose(candidates, demand, exclude)
        if choice is not None:
            return usable[choice.worker_id]
        raise self._none_serves(model)

    def send(self, worker: Worker, start: StartGeneration, place: Place) -> int:
        """Begin a request there; returns its handle, for ``worker.connection.forget``.

        Raises ``WorkerUnreachable`` or ``Overloaded``.
        """
        return worker.send(next(self._sequence), start, place)

    async def wait_changed(self, timeout_s: float) -> None:
        """Until a worker comes, goes or changes its state, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()

    def _on_change(self) -> None:
        """Wake all that wait; those that begin to wait later wait for the next change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _serving(self, model: str) -> list[Worker]:
        return [worker for worker in self.workers if worker.serves(model)]

    def _none_serves(self, model: str) -> PrecastError:
        if model in self._first_seen or model in self._expected:
            return WorkerUnavailable(f"No worker is ready to serve the model {model!r}.")
        return ModelNotFound(f"The model {model!r} does not exist.")

    async def _run(self) -> None:
        while True:
            await self.wait_changed(self._pause.wait_s(self._failures) or self._next_look_s())
            await self.refresh()

    def _next_look_s(self) -> float:
        """Until the list is read again: while all workers answer it can tell of new ones alone."""
        all_answer = all(worker.connection.up for worker in self._workers.values())
        return self._refresh_s if self._workers and all_answer else self._soon_s

    async def refresh(self) -> None:
        """Read the leases. While Redis is down, the last-known workers stay. Never fails."""
        try:
            await self._apply(await self._registry.decode_workers())
        except RegistryUnavailable as error:
            self._failures += 1
            if self._failures == 1:
                log.warning("registry lost; keeping the known workers", reason=str(error))
            return
        except Exception:  # whatever leases hold, discovery must not end
            self._failures += 1
            log.exception("worker discovery failed")
            return
        if self._failures:
            log.info("registry is back")
        self._failures = 0

    async def _apply(self, leases: Iterable[DecodeLease]) -> None:
        if self.stopping:
            return
        by_address: defaultdict[str, list[DecodeLease]] = defaultdict(list)
        for lease in leases:
            if len(self._first_seen) < _MAX_MODELS:
                for name in (lease.model, *lease.adapters):
                    self._first_seen.setdefault(name, time.time())
            by_address[lease.address].append(lease)
        for address, found in by_address.items():
            self._observe(address, found)
        for address, worker in list(self._workers.items()):
            if address not in by_address:
                worker.miss()
            if worker.forgotten:
                await self._workers.pop(address).close()

    def _observe(self, address: str, leases: Sequence[DecodeLease]) -> None:
        worker = self._workers.get(address)
        if worker is None:
            lease = leases[-1]
            log.info("worker found", worker_id=lease.worker_id, address=address)
            worker = self._workers[address] = Worker(lease, self._on_change, self.usual, self._tls)
        worker.observe(_present(worker, leases))


def _present(worker: Worker, leases: Sequence[DecodeLease]) -> DecodeLease:
    """The lease of whoever is at the address now: one that was killed has its own for a while."""
    if worker.connection.up:
        answering = [lease for lease in leases if lease.worker_id == worker.worker_id]
    else:
        answering = [lease for lease in leases if lease.worker_id != worker.lease.worker_id]
    return (answering or leases)[0]
