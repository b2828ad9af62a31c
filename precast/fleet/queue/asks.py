"""Which graphs each worker asks for, and whether anybody still wants one.

A decode worker repeats every few seconds all that it wants, so its latest request replaces the one
before. It is kept in Redis for a minute: longer than a lease, so that a worker whose lease was lost
for a moment is still known. What only such a worker wants is not captured now, and lapses when its
request does. A worker that asks without a lease evidently lives, and counts.
"""

import enum
from dataclasses import dataclass
from typing import Final

import msgspec

from precast.fleet.leases import DecodeLease, Registry, bounded, text

ASK_TTL_S: Final = 60.0
MAX_ASKS: Final = 4096
_SET: Final = "precast:asks"
"""Ids of the workers that have asked lately."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What graphs a worker may ask for, as its lease has it."""

    sizes: tuple[int, ...]
    """Tokens of a step, ascending."""
    tensor_parallel_size: int
    isa: str
    """Empty: not known."""


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker wants."""

    worker_id: str
    keys: tuple[str, ...]
    limits: Limits
    leased: bool = True
    """Whether it held a lease when it asked."""


class Interest(enum.Enum):
    """Who wants a graph."""

    LIVE = enum.auto()
    """A live worker."""
    ABSENT = enum.auto()
    """Only workers that have asked lately and may be gone."""
    NOBODY = enum.auto()


def limits_of(lease: DecodeLease) -> Limits:
    """From what a worker runs and what it misses."""
    sizes = {*lease.captures_wanted, *(graph.num_tokens for graph in lease.graphs)}
    return Limits(
        sizes=tuple(sorted(sizes)),
        tensor_parallel_size=lease.tensor_parallel_size,
        isa=lease.isa,
    )


@dataclass(frozen=True, kw_only=True)
class Asks:
    """Asks in one Redis. Every call is bounded and raises ``RegistryUnavailable`` on failure."""

    registry: Registry
    ttl_s: float = ASK_TTL_S

    async def latest(self, worker_id: str) -> Ask | None:
        """What a worker asked for, if that was lately."""
        async with bounded():
            return _decoded(await self.registry.redis.get(_name(worker_id)))

    async def replace(self, ask: Ask) -> set[str]:
        """Keep what a worker wants now; the keys that it wanted before and nobody wants now."""
        before = await self.latest(ask.worker_id)
        async with bounded(), self.registry.redis.pipeline(transaction=False) as pipeline:
            pipeline.set(_name(ask.worker_id), msgspec.json.encode(ask), px=int(self.ttl_s * 1e3))
            pipeline.sadd(_SET, ask.worker_id)
            await pipeline.execute()
        given_up = set(before.keys if before else ()) - set(ask.keys)
        if given_up:
            given_up.difference_update(*[other.keys for other in await self._all()])
        return given_up

    async def interest(self, key: str) -> Interest:
        """Who wants a graph now."""
        asking = [ask for ask in await self._all() if key in ask.keys]
        if not asking:
            return Interest.NOBODY
        live = {lease.worker_id for lease in await self.registry.decode_workers()}
        lives = any(ask.worker_id in live or not ask.leased for ask in asking)
        return Interest.LIVE if lives else Interest.ABSENT

    async def _all(self) -> list[Ask]:
        """Of every worker that has asked lately; the others' names are forgotten."""
        async with bounded():
            client = self.registry.redis
            ids = sorted(await client.smembers(_SET))[:MAX_ASKS]
            values = await client.mget([_name(text(each)) for each in ids]) if ids else []
            gone = [each for each, value in zip(ids, values, strict=True) if value is None]
            if gone:
                await client.srem(_SET, *gone)
        return [ask for ask in map(_decoded, values) if ask is not None]


def _name(worker_id: str) -> str:
    return f"precast:asks:{worker_id}"


def _decoded(value: bytes | str | None) -> Ask | None:
    """None too for what another version wrote."""
    try:
        return _decoder.decode(value) if value is not None else None
    except msgspec.DecodeError:
        return None


_decoder: Final = msgspec.json.Decoder(Ask)
