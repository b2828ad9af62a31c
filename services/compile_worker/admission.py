"""Who may have graphs captured: a decode worker, and those that its lease speaks of.

A lease may be lost for a moment on a busy host: then what it last said still counts, and a worker
of which nothing is known asks again once it has a lease.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from precast.errors import (
    InvalidRequest,
    Overloaded,
    PrecastError,
    RegistryUnavailable,
    WrongState,
)
from precast.fleet.leases import WORKER_ID
from precast.fleet.queue.asks import Ask, Asks, Limits, limits_of
from precast.log import get_logger
from services.compile_worker.catalog.entry import GraphRecord, Phase
from services.compile_worker.graphs import Graphs

log = get_logger(__name__)

_WORKER_ID: Final = re.compile(WORKER_ID)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Checks what workers ask for, and keeps who wants what."""

    graphs: Graphs
    asks: Asks

    async def request(
        self,
        worker_id: str,
        specs: Sequence[Mapping[str, str]],
        model: str,
        urgencies: Sequence[int],
    ) -> list[GraphRecord]:
        """``Graphs.request`` for a worker that may have these graphs. Of others' graphs what is
        known is told, and nothing done.

        Raises ``InvalidRequest``, ``WrongState`` or ``Overloaded`` if that is nothing.
        """
        keys = self.graphs.keys(specs)
        refusal = await self._refusal(worker_id, specs, keys) if specs else None
        if refusal is None:
            return await self.graphs.request(specs, model, urgencies)
        known = [await self.graphs.known(key) for key in keys]
        if not any(known):
            raise refusal
        error = f"not queued for capture: {refusal}"
        return [
            record or GraphRecord(key=key, phase=Phase.FAILED, factors=dict(spec), error=error)
            for key, record, spec in zip(keys, known, specs, strict=True)
        ]

    async def _refusal(
        self, worker_id: str, specs: Sequence[Mapping[str, str]], keys: Sequence[str]
    ) -> PrecastError | None:
        """Why nothing may be queued for this request; else it is kept as what the worker wants."""
        try:
            limits, leased = await self._limits(worker_id)
            for factors in specs:
                _check(worker_id, limits, factors)
            _check_count(worker_id, limits, len(set(keys)))
            await self._keep(
                Ask(worker_id=worker_id, keys=tuple(keys), limits=limits, leased=leased)
            )
        except RegistryUnavailable:
            return None  # the queue is in the same Redis, and says so for each graph
        except (InvalidRequest, WrongState, Overloaded) as error:
            log.warning("captures refused", reason=str(error))
            return error
        return None

    async def _limits(self, worker_id: str) -> tuple[Limits, bool]:
        """What a worker may ask for, and whether it holds a lease now."""
        if not _WORKER_ID.fullmatch(worker_id):
            raise InvalidRequest(f"worker_id {worker_id[:128]!r} is no decode worker's id")
        for lease in await self.asks.registry.decode_workers():
            if lease.worker_id == worker_id:
                return limits_of(lease), True
        if known := await self.asks.latest(worker_id):
            return known.limits, False
        raise WrongState(f"worker {worker_id} holds no lease in Redis; ask again once it does")

    async def _keep(self, ask: Ask) -> None:
        for key in await self.asks.replace(ask):
            if job := await self.graphs.queue.lapse_waiting(key):
                await self.graphs.lapsed(job)


def _check(worker_id: str, limits: Limits, factors: Mapping[str, str]) -> None:
    if int(factors["num_tokens"]) not in limits.sizes:
        sizes = ", ".join(map(str, limits.sizes)) or "none"
        raise InvalidRequest(
            f"num_tokens = {factors['num_tokens']}: worker {worker_id} has graphs of {sizes}"
        )
    has = {"tp_size": str(limits.tensor_parallel_size), "isa": limits.isa}
    for name, value in has.items():
        if value and factors[name] != value:
            raise InvalidRequest(f"{name} = {factors[name]}: that of worker {worker_id} is {value}")


def _check_count(worker_id: str, limits: Limits, graphs: int) -> None:
    """Each rank may have a shard of its own shape."""
    most = len(limits.sizes) * limits.tensor_parallel_size
    if graphs > most:
        raise Overloaded(
            f"{graphs} graphs in one request: worker {worker_id} can run {most} "
            f"({len(limits.sizes)} sizes, tensor parallel size {limits.tensor_parallel_size})"
        )
