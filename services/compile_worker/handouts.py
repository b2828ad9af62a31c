"""Who was given which graph: a crash is believed only of a worker that could have it.

A worker's address is kept, not its id: after a restart it may still have to report what ended it.
Kept in Redis for all compile workers, and for as long as a worker may run out of its cache.
"""

from dataclasses import dataclass
from typing import Final

from precast.errors import InvalidRequest, RegistryUnavailable
from precast.fleet.leases import DecodeLease, Registry, bounded
from precast.log import get_logger

log = get_logger(__name__)

KEPT_S: Final = 30 * 24 * 3600


@dataclass(frozen=True, kw_only=True)
class Handouts:
    registry: Registry

    async def note(self, worker_id: str, key: str, version: int) -> None:
        """A worker gets a version. Without Redis, or from a worker without a lease, nothing is
        kept: a crash that it reports later is then not believed."""
        try:
            lease = await self._lease(worker_id)
            if lease is None:
                return
            name = _name(key, version)
            async with bounded(), self.registry.redis.pipeline(transaction=False) as pipeline:
                pipeline.sadd(name, lease.address)
                pipeline.expire(name, KEPT_S)
                await pipeline.execute()
        except RegistryUnavailable as error:
            log.warning("not noted who has a graph", key=key, reason=str(error))

    async def check(self, worker_id: str, key: str, version: int) -> None:
        """Raises ``InvalidRequest`` unless a live worker of this id has or had the version, and
        ``RegistryUnavailable`` if that can't be known now."""
        lease = await self._lease(worker_id)
        if lease is None:
            raise InvalidRequest(f"worker {worker_id[:128]!r} holds no lease")
        if _runs(lease, key, version):
            return
        async with bounded():
            had = await self.registry.redis.execute_command(  # type: ignore[no-untyped-call]
                "SISMEMBER", _name(key, version), lease.address
            )
        if not had:
            raise InvalidRequest(
                f"worker {worker_id[:128]!r} was not given version {version} of graph {key}"
            )

    async def _lease(self, worker_id: str) -> DecodeLease | None:
        if not worker_id:
            return None
        leases = await self.registry.decode_workers()
        return next((lease for lease in leases if lease.worker_id == worker_id), None)


def _runs(lease: DecodeLease, key: str, version: int) -> bool:
    return any(
        (key, version) in zip(graph.keys, graph.versions, strict=False) for graph in lease.graphs
    )


def _name(key: str, version: int) -> str:
    return f"precast:given:{key}:{version}"
