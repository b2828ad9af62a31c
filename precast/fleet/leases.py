"""Who is alive: workers' leases in Redis.

A worker publishes its record as JSON under ``precast:lease:<kind>:<worker_id>`` with a time to live
and renews it every two seconds with its load. Everything is level-triggered: after an outage of
Redis the next beat puts the record back, and readers keep their last-known list meanwhile. A lease
that is gone means that Redis has not heard of the worker lately, no more: who holds a connection to
it knows better.

Whoever reaches Redis can write a lease, so leases are checked like any input. Each beat also puts
the worker's id into the set ``precast:leases:<kind>``, so that readers need not look through all
keys; they still do so now and then, for workers of a version that doesn't.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Annotated, ClassVar, Final, Literal, Self, TypeVar

import redis.asyncio
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from precast.config.secrets import masked
from precast.errors import ConfigError, RegistryUnavailable
from precast.log import get_logger
from precast.rpc.address import Address

log = get_logger(__name__)

REDIS_FAILURES: Final = (RedisError, OSError, ValueError)
"""What Redis' client raises of a server that is away, refuses, or is none: of what such a one says
it can't read the numbers."""
LEASE_TTL_S: Final = 6.0
"""Three beats' time: a host that is busy for one or two of them loses no lease."""
_SOCKET_TIMEOUT_S: Final = 1.0
_OPERATION_TIMEOUT_S: Final = 2.5
"""Bound of one registry call: name resolution, connecting and one retry included."""
SCAN_INTERVAL_S: Final = 10.0
"""How often a reader looks through all keys for leases that are not in the set of their kind."""
MAX_LEASES: Final = 4096
MAX_LEASE_BYTES: Final = 256 << 10
MAX_CONTEXT: Final = 1 << 24
"""Tokens. More than any model has, and little enough to reckon with."""
_MAX_REPORTED: Final = 1024

WorkerState = Literal["starting", "ready", "restarting", "draining"]


def _connectable(text: str) -> str:
    address = Address.parse(text)
    if not address.port or address.wildcard:
        raise ValueError("must name a host and a port")
    return text


WORKER_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
WorkerId = Annotated[str, Field(pattern=WORKER_ID)]
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+-]{0,64}$")]
WorkerAddress = Annotated[str, AfterValidator(_connectable)]
Requests = Annotated[int, Field(ge=0, le=1 << 20)]
Tokens = Annotated[int, Field(ge=1, le=MAX_CONTEXT)]
Blocks = Annotated[int, Field(ge=0, le=1 << 40)]


class _Lease(BaseModel):
    # Unknown fields are ignored: during an upgrade, newer workers meet older readers here.
    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: ClassVar[str]
    worker_id: WorkerId
    """Unique to one start of one worker."""
    address: WorkerAddress
    """``host:port`` at which the worker's gRPC server is reached."""
    pid: Annotated[int, Field(ge=0, le=1 << 31)] = 0
    """Of its process, where that was started; 0: not told."""

    @property
    def redis_key(self) -> str:
        return _key(self.kind, self.worker_id)


class LoadedGraphRecord(BaseModel):
    """A graph size (tokens of a step) that a decode worker replays from a graph."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_tokens: Tokens
    keys: Annotated[tuple[Word, ...], Field(max_length=64)]
    """One for each rank."""
    versions: Annotated[tuple[int, ...], Field(max_length=64)]


class DecodeLease(_Lease):
    """What a decode worker says of itself."""

    kind: ClassVar[str] = "decode"
    model: ModelName
    adapters: Annotated[tuple[ModelName, ...], Field(max_length=64)] = ()
    """Names under which it serves the model with adapters."""
    state: WorkerState
    running: Requests = 0
    waiting: Requests = 0
    max_batch_size: Annotated[int, Field(ge=1, le=1 << 16)]
    max_context_length: Tokens
    kv_blocks_total: Blocks = 0
    kv_blocks_free: Blocks = 0
    tensor_parallel_size: Annotated[int, Field(ge=1, le=1 << 10)] = 1
    isa: Word = ""
    """Best target of graphs that its CPU runs; empty until its ranks have started."""
    weight_dtype: Word
    quantization: Word
    tokenizer_digest: Word = ""
    """Of the tokenizer that it decodes with; empty: not known."""
    graphs: Annotated[tuple[LoadedGraphRecord, ...], Field(max_length=4096)] = ()
    captures_wanted: Annotated[tuple[Tokens, ...], Field(max_length=4096)] = ()
    """Batch sizes that are served eagerly because their graph is missing."""


class CompileLease(_Lease):
    """What a compile worker says of itself."""

    kind: ClassVar[str] = "compile"
    queued: Requests = 0
    capturing: Requests = 0


def _key(kind: str, worker_id: str) -> str:
    return f"precast:lease:{kind}:{worker_id}"


def _set_key(kind: str) -> str:
    """The set of the ids of all workers of a kind that have published lately."""
    return f"precast:leases:{kind}"


def version_of(lease: DecodeLease, key: str) -> int | None:
    """The oldest version of the key among a worker's ranks; None if it doesn't run it."""
    pairs = [
        pair for graph in lease.graphs for pair in zip(graph.keys, graph.versions, strict=False)
    ]
    return min((version for name, version in pairs if name == key), default=None)


Lease = DecodeLease | CompileLease
_L = TypeVar("_L", DecodeLease, CompileLease)


def connect_redis(url: str, *, timeout_s: float = _SOCKET_TIMEOUT_S) -> redis.asyncio.Redis:
    """A client of which no call hangs: short socket timeouts and one retry for a stale connection.

    Connects on first use. Raises ``ConfigError`` if ``url`` is not a Redis URL.
    """
    try:
        return redis.asyncio.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
            decode_responses=False,
        )
    except ValueError as error:
        raise ConfigError(masked(f"redis_url {url!r}: {error}")) from None


class Registry:
    """Leases in one Redis. Every call is bounded and raises ``RegistryUnavailable`` on failure."""

    def __init__(self, client: redis.asyncio.Redis, *, lease_ttl_s: float = LEASE_TTL_S) -> None:
        self._client = client
        self._ttl_ms = int(lease_ttl_s * 1000)
        self._scanned: dict[str, tuple[float, frozenset[str]]] = {}
        """When all keys were last looked through for leases of a kind (monotonic, s), and which
        there were."""
        self._known: dict[str, list[str]] = {}
        """Keys of leases of a kind when they were read last."""
        self._ignored: dict[str, str] = {}
        """Keys of leases that were reported as wrong, and why."""

    @classmethod
    def connect(cls, url: str, *, lease_ttl_s: float = LEASE_TTL_S) -> Self:
        """A registry at ``url``. Does not wait for Redis: the first call connects."""
        return cls(connect_redis(url), lease_ttl_s=lease_ttl_s)

    @property
    def redis(self) -> redis.asyncio.Redis:
        """The client, for other users of the same Redis in this process."""
        return self._client

    async def close(self) -> None:
        await self._client.aclose()

    async def ping(self) -> None:
        async with bounded():
            await self._client.ping()

    async def publish(self, record: Lease) -> None:
        """Create or renew the lease, with this record as its value."""
        async with bounded(), self._client.pipeline(transaction=False) as pipeline:
            pipeline.set(record.redis_key, record.model_dump_json(), px=self._ttl_ms)
            pipeline.sadd(_set_key(record.kind), record.worker_id)
            await pipeline.execute()

    async def withdraw(self, record: Lease) -> None:
        """End the lease now. No error if it is gone already."""
        async with bounded(), self._client.pipeline(transaction=False) as pipeline:
            pipeline.delete(record.redis_key)
            pipeline.srem(_set_key(record.kind), record.worker_id)
            await pipeline.execute()

    async def decode_workers(self) -> list[DecodeLease]:
        """Live decode workers, by worker id."""
        return await self._list(DecodeLease)

    async def compile_workers(self) -> list[CompileLease]:
        """Live compile workers, by worker id."""
        return await self._list(CompileLease)

    async def _list(self, kind: type[_L]) -> list[_L]:
        async with bounded():
            keys, values = await self._read(kind.kind)
            expired = [key for key, value in zip(keys, values, strict=True) if value is None]
            await self._forget(kind.kind, expired)
        found = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
        records = [self._parse(kind, key, value) for key, value in found]
        return [record for record in records if record is not None]

    async def _read(self, kind: str) -> tuple[list[str], list[bytes | str | None]]:
        """Keys of leases that there may be, in order, and what they hold: one trip to Redis where
        they are those of the last time."""
        known = self._known.get(kind, [])
        async with self._client.pipeline(transaction=False) as pipeline:
            pipeline.smembers(_set_key(kind))
            if known:
                pipeline.mget(known)
            members, *values = await pipeline.execute()
        keys = self._known[kind] = await self._keys(kind, members)
        if keys and keys == known:
            return keys, values[0]
        return keys, (await self._client.mget(keys) if keys else [])

    async def _keys(self, kind: str, members: Iterable[bytes]) -> list[str]:
        """``members``: of the set of this kind."""
        at, scanned = self._scanned.get(kind, (float("-inf"), frozenset()))
        if time.monotonic() - at >= SCAN_INTERVAL_S:
            found = self._client.scan_iter(match=_key(kind, "*"), count=1000)
            scanned = frozenset([text(key) async for key in found])
            self._scanned[kind] = time.monotonic(), scanned
        return sorted({_key(kind, text(member)) for member in members} | scanned)[:MAX_LEASES]

    async def _forget(self, kind: str, expired: list[str]) -> None:
        """Take expired leases out of the set. One that comes back meanwhile is put in again by its
        next beat."""
        ids = [key.removeprefix(_key(kind, "")) for key in expired]
        with suppress(ResponseError):  # a Redis that takes no writes can still be read
            if ids:
                await self._client.srem(_set_key(kind), *ids)

    def _parse(self, kind: type[_L], key: str, value: bytes | str) -> _L | None:
        """The record; None for anything that is not a proper one, with one line in the log."""
        try:
            if len(value) > MAX_LEASE_BYTES:
                raise ValueError(f"{len(value)} bytes; at most {MAX_LEASE_BYTES}")
            record = kind.model_validate_json(value)
            if record.redis_key != key:
                raise ValueError(f"worker_id {record.worker_id!r} under another worker's key")
        except ValueError as error:  # ValidationError is one
            self._report(key, _reason(error))
            return None
        self._ignored.pop(key, None)
        return record

    def _report(self, key: str, reason: str) -> None:
        if self._ignored.get(key) == reason:
            return
        while len(self._ignored) >= _MAX_REPORTED:
            del self._ignored[next(iter(self._ignored))]
        self._ignored[key] = reason
        log.warning("lease ignored", key=key[:200], reason=reason)


def text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False)[0]
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


@asynccontextmanager
async def bounded() -> AsyncIterator[None]:
    """Redis calls within: an end after 2.5 s, and ``RegistryUnavailable`` for whatever fails."""
    try:
        async with asyncio.timeout(_OPERATION_TIMEOUT_S):
            yield
    except TimeoutError:
        raise RegistryUnavailable(
            f"Redis did not answer within {_OPERATION_TIMEOUT_S:g} s"
        ) from None
    except REDIS_FAILURES as error:
        raise RegistryUnavailable(f"Redis: {error}") from error
