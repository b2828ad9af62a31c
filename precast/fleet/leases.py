"""Who is alive: workers' leases in Redis.

A worker publishes its record as JSON under ``precast:lease:<kind>:<worker_id>`` with a time to live
and renews it every second with its fresh load. A worker whose lease is gone is dead. Everything is
level-triggered: after an outage of Redis the next beat puts the record back, and readers keep their
last-known list meanwhile.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ClassVar, Final, Literal, Self, TypeVar

import redis.asyncio
from pydantic import BaseModel, ConfigDict, ValidationError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from precast.errors import ConfigError, RegistryUnavailable
from precast.log import get_logger

log = get_logger(__name__)

LEASE_TTL_S: Final = 3.0
HEARTBEAT_INTERVAL_S: Final = 1.0
_SOCKET_TIMEOUT_S: Final = 1.0
_OPERATION_TIMEOUT_S: Final = 2.5
"""Bound of one registry call: name resolution, connecting and one retry included."""

WorkerState = Literal["starting", "ready", "restarting", "draining"]


class _Lease(BaseModel):
    # Unknown fields are ignored: during an upgrade, newer workers meet older readers here.
    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: ClassVar[str]
    worker_id: str
    """Unique to one start of one worker."""
    address: str
    """``host:port`` at which the worker's gRPC server is reached."""

    @property
    def redis_key(self) -> str:
        return f"precast:lease:{self.kind}:{self.worker_id}"


class LoadedGraphRecord(BaseModel):
    """A graph size (tokens of a step) that a decode worker replays from a graph."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    num_tokens: int
    keys: tuple[str, ...]
    """One for each rank."""
    versions: tuple[int, ...]


class DecodeLease(_Lease):
    """What a decode worker says of itself."""

    kind: ClassVar[str] = "decode"
    model: str
    state: WorkerState
    running: int = 0
    waiting: int = 0
    max_batch_size: int
    max_context_length: int
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    tensor_parallel_size: int = 1
    isa: str = ""
    """Best target of graphs that its CPU runs; empty until its ranks have started."""
    weight_dtype: str
    quantization: str
    graphs: tuple[LoadedGraphRecord, ...] = ()
    captures_wanted: tuple[int, ...] = ()
    """Batch sizes that are served eagerly because their graph is missing."""


class CompileLease(_Lease):
    """What a compile worker says of itself."""

    kind: ClassVar[str] = "compile"
    queued: int = 0
    capturing: int = 0


def version_of(lease: DecodeLease, key: str) -> int | None:
    """The oldest version of the key among a worker's ranks; None if it doesn't run it."""
    pairs = [
        pair for graph in lease.graphs for pair in zip(graph.keys, graph.versions, strict=False)
    ]
    return min((version for name, version in pairs if name == key), default=None)


Lease = DecodeLease | CompileLease
_L = TypeVar("_L", DecodeLease, CompileLease)


def connect_redis(url: str) -> redis.asyncio.Redis:
    """A client of which no call hangs: short socket timeouts and one retry for a stale connection.

    Connects on first use. Raises ``ConfigError`` if ``url`` is not a Redis URL.
    """
    try:
        return redis.asyncio.Redis.from_url(
            url,
            socket_timeout=_SOCKET_TIMEOUT_S,
            socket_connect_timeout=_SOCKET_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
            decode_responses=False,
        )
    except ValueError as error:
        raise ConfigError(f"redis_url {url!r}: {error}") from None


class Registry:
    """Leases in one Redis. Every call is bounded and raises ``RegistryUnavailable`` on failure."""

    def __init__(self, client: redis.asyncio.Redis, *, lease_ttl_s: float = LEASE_TTL_S) -> None:
        self._client = client
        self._ttl_ms = int(lease_ttl_s * 1000)

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
        async with bounded():
            await self._client.set(record.redis_key, record.model_dump_json(), px=self._ttl_ms)

    async def withdraw(self, record: Lease) -> None:
        """End the lease now. No error if it is gone already."""
        async with bounded():
            await self._client.delete(record.redis_key)

    async def decode_workers(self) -> list[DecodeLease]:
        """Live decode workers, by worker id."""
        return await self._list(DecodeLease)

    async def compile_workers(self) -> list[CompileLease]:
        """Live compile workers, by worker id."""
        return await self._list(CompileLease)

    async def _list(self, kind: type[_L]) -> list[_L]:
        async with bounded():
            pattern = f"precast:lease:{kind.kind}:*"
            keys = {key async for key in self._client.scan_iter(match=pattern, count=1000)}
            values = await self._client.mget(sorted(keys)) if keys else []
        records = [_parse(kind, value) for value in values if value is not None]
        return [record for record in records if record is not None]


def _parse(kind: type[_L], value: bytes | str) -> _L | None:
    """The record, or None where a worker of another version wrote something unreadable."""
    try:
        return kind.model_validate_json(value)
    except ValidationError as error:
        log.warning("lease ignored", kind=kind.kind, reason=str(error.errors()[0]["msg"]))
        return None


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
    except (RedisError, OSError) as error:
        raise RegistryUnavailable(f"Redis: {error}") from error


class Heartbeat:
    """Publishes what ``make_record`` returns, every second, until stopped.

    Outages of Redis are logged once and outlived; ``stop`` withdraws the lease. Use it as an async
    context manager or through ``start`` and ``stop``.
    """

    def __init__(
        self,
        registry: Registry,
        make_record: Callable[[], Lease],
        *,
        interval_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        self._registry = registry
        self._make_record = make_record
        self._interval_s = interval_s
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reachable = True

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="heartbeat")

    def publish_soon(self) -> None:
        """Publish now instead of at the next beat: readers should see a change at once."""
        self._changed.set()

    async def stop(self) -> None:
        """Stop beating and withdraw the lease. Bounded, and never fails."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        try:
            await self._registry.withdraw(self._make_record())
        except RegistryUnavailable as error:
            log.warning("lease not withdrawn; it will expire", reason=str(error))

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _run(self) -> None:
        while True:
            self._changed.clear()
            await self._beat()
            try:
                async with asyncio.timeout(self._interval_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def _beat(self) -> None:
        try:
            await self._registry.publish(self._make_record())
        except RegistryUnavailable as error:
            if self._reachable:
                log.warning("registry lost; going on without it", reason=str(error))
            self._reachable = False
        except Exception:  # a broken record must not silently end the beats
            log.exception("heartbeat failed")
        else:
            if not self._reachable:
                log.info("registry is back; lease published again")
            self._reachable = True
