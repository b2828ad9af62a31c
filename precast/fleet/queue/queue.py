"""The fleet's queue of captures, in Redis Streams.

A key has at most one active job, and whoever captures it holds the key's lease, so a graph is
compiled once however many workers ask for it and however many compile workers listen. A compile
worker that dies stops renewing: the lease expires and another one claims the job's idle stream
entry. Jobs travel in one stream per tool chain, so that nobody claims what it would compile
differently. What traffic needs comes first, by how often it was needed; the rest in the order of
requests. Who holds a claim looks whether anybody still wants the job (``asks.py``).

Redis may lose everything at any moment: holders put their job back when they renew, and workers
ask again for what they miss. A job names the version that it will publish; publishing it a
second time is refused by the store. That, not Redis, is the last word.
"""

import enum
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

import redis.asyncio
from redis.exceptions import ResponseError

from precast.errors import JobNotFound, Overloaded
from precast.fleet.leases import bounded
from precast.fleet.queue.job import Job, Stage, decode_job, encode_job, replace_job
from precast.fleet.queue.scripts import CLAIM_URGENT, DROP, ENQUEUE, FINISH, RELEASE, RENEW

GROUP: Final = "compile"
LEASE_TTL_S: Final = 5.0
RENEW_INTERVAL_S: Final = 1.0
HISTORY: Final = 200
LAPSED: Final = "no worker wants it any more"
MAX_URGENCY: Final = 1 << 31
_GROUP_ERRORS: Final = ("NOGROUP", "BUSYGROUP", "no such key")
_BLOCK_MS: Final = 500
_FORGET_CONSUMER_MS: Final = 3_600_000
_RECORDS: Final = "precast:jobs:records"
_ACTIVE: Final = "precast:jobs:active"
_CANCELS: Final = "precast:jobs:cancels"
_ENDED: Final = "precast:jobs:ended"
_KEPT: Final = "precast:jobs:kept"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A job that this process holds."""

    job: Job
    entry: str
    """Its entry in the stream."""
    token: str
    """Value of the key's lease: unique to this claim."""


class Hold(enum.StrEnum):
    """What a renewal found."""

    HELD = "held"
    LOST = "lost"
    """Another process holds the key now: stop, and publish nothing."""
    CANCELLED = "cancelled"
    """Somebody asked for the job's end."""


class CaptureQueue:
    """The queue as seen by one compile worker.

    Every method is bounded in time and raises ``RegistryUnavailable`` while Redis is away.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        build_id: str,
        *,
        max_queued: int = 1024,
        lease_ttl_s: float = LEASE_TTL_S,
    ) -> None:
        self._client = client
        self._stream = f"precast:jobs:{build_id}"
        self._urgent = f"{self._stream}:urgent"
        self._entries = f"{self._stream}:entries"
        self._max_queued = max_queued
        self._ttl_ms = int(lease_ttl_s * 1000)

    async def enqueue(self, job: Job, *, urgency: int = 0, kept: bool = False) -> Job:
        """Queue a job, or return the key's active one, which becomes as urgent if it still waits.

        ``kept``: asked for by hand, so that it never lapses. Raises ``Overloaded`` if the queue is
        full.
        """
        keys = [self._stream, _RECORDS, _ACTIVE, self._urgent, self._entries, _KEPT]
        arguments = [job.key, job.id, encode_job(job), self._max_queued]
        arguments += [min(urgency, MAX_URGENCY), int(kept)]
        verdict, record = await self._eval(ENQUEUE, keys, arguments)
        if verdict == b"full":
            raise Overloaded(f"capture queue is full ({self._max_queued} jobs)")
        return decode_job(record) or job

    async def claim(self, consumer: str) -> Claim | None:
        """The next job to capture; ``None`` after half a second without one.

        Jobs of dead workers come first, then urgent ones, most urgent first, then others in the
        order of their requests.
        """
        try:
            entry = (
                await self._stale_entry(consumer)
                or await self._urgent_entry(consumer)
                or await self._new_entry(consumer)
            )
        except ResponseError:
            await self._create_group()
            return None
        return await self._take(*entry, consumer) if entry else None

    async def renew(self, claim: Claim, consumer: str) -> Hold:
        """Keep the claim for another lease time and store the job's present state."""
        job = claim.job
        keys = [self._stream, _RECORDS, _ACTIVE, _CANCELS, _lease(job.key)]
        keys += [self._urgent, self._entries]
        arguments = [claim.token, self._ttl_ms, GROUP, consumer, claim.entry]
        found = await self._eval(RENEW, keys, [*arguments, job.id, job.key, encode_job(job)])
        return Hold(found.decode())

    async def finish(self, claim: Claim) -> bool:
        """Store the end of a job and free its key; false if another process holds the key by
        now."""
        job = claim.job
        keys = [self._stream, _RECORDS, _ACTIVE, _CANCELS, _lease(job.key), _ENDED]
        keys += [self._urgent, self._entries, _KEPT]
        arguments = [claim.token, GROUP, claim.entry, job.id, job.key, encode_job(job), HISTORY]
        return bool(await self._eval(FINISH, keys, arguments))

    async def cancel(self, job_id: str) -> Job:
        """Ask for a job's end. A queued job ends now, a running one when its holder next renews.

        Raises ``JobNotFound``. Returns the job as it is now; an ended job stays as it ended.
        """
        job = await self.get(job_id)
        if job.stage.ended:
            return job
        await self._command("HSET", _CANCELS, job_id, "1")
        await self._end_waiting(job, "cancelled")
        return await self.get(job_id)

    async def put_back(self, claim: Claim) -> None:
        """Give up a claim. Its job comes up again after a lease time."""
        await self._eval(RELEASE, [_lease(claim.job.key)], [claim.token])

    async def lapse(self, claim: Claim) -> None:
        """End a job that is held here because nobody wants it."""
        await self.finish(replace(claim, job=_cancelled(claim.job, LAPSED)))

    async def lapse_waiting(self, key: str) -> Job | None:
        """The same for a key's job that waits, unless it is kept; the job that ended."""
        job_id = await self._command("HGET", _ACTIVE, key)
        if job_id is None or await self.is_kept(job_id.decode()):
            return None
        return await self._end_waiting(await self.get(job_id.decode()), LAPSED)

    async def is_kept(self, job_id: str) -> bool:
        return bool(await self._command("SISMEMBER", _KEPT, job_id))

    async def get(self, job_id: str) -> Job:
        """Raises ``JobNotFound``."""
        record = await self._command("HGET", _RECORDS, job_id)
        job = decode_job(record) if record is not None else None
        if job is None:
            raise JobNotFound(f"no capture job {job_id[:64]!r}")
        return job

    async def jobs(self) -> list[Job]:
        """Active jobs and the latest ended ones, oldest first."""
        records = map(decode_job, await self._command("HVALS", _RECORDS))
        known = [job for job in records if job is not None]
        return sorted(known, key=lambda job: (job.queued_at, job.id))

    async def length(self) -> int:
        """Jobs queued or being captured."""
        return int(await self._command("HLEN", _ACTIVE))

    async def forget_dead_consumers(self) -> None:
        """Drop the names of workers that are long gone and left no job behind."""
        try:
            rows = await self._command("XINFO CONSUMERS", self._stream, GROUP)
        except ResponseError:  # no stream or group yet
            return
        for row in rows:
            if row["pending"] == 0 and row["idle"] > _FORGET_CONSUMER_MS:
                name = row["name"].decode()
                await self._command("XGROUP", "DELCONSUMER", self._stream, GROUP, name)

    async def _stale_entry(self, consumer: str) -> tuple[str, str] | None:
        reply = await self._command(
            "XAUTOCLAIM", self._stream, GROUP, consumer, self._ttl_ms, "0-0", "COUNT", 1
        )
        return _first_entry(reply[1])

    async def _urgent_entry(self, consumer: str) -> tuple[str, str] | None:
        keys = [self._stream, self._urgent, self._entries]
        found = await self._eval(CLAIM_URGENT, keys, [GROUP, consumer])
        return (found[0].decode(), found[1].decode()) if found else None

    async def _new_entry(self, consumer: str) -> tuple[str, str] | None:
        reply = await self._command(
            *("XREADGROUP", "GROUP", GROUP, consumer, "COUNT", 1, "BLOCK", _BLOCK_MS),
            *("STREAMS", self._stream, ">"),
        )
        if not reply:
            return None
        streams = list(reply.values()) if isinstance(reply, dict) else [reply[0][1]]
        return _first_entry(streams[0])

    async def _create_group(self) -> None:
        with suppress(ResponseError):  # another worker was first
            await self._command("XGROUP", "CREATE", self._stream, GROUP, "0", "MKSTREAM")

    async def _take(self, entry: str, job_id: str, consumer: str) -> Claim | None:
        """Turn a stream entry into a claim, unless its job has ended or its key is held."""
        try:
            job = await self.get(job_id)
        except JobNotFound:
            await self._drop(entry, "", "")
            return None
        token = f"{consumer}/{uuid.uuid4().hex}"
        if not await self._lease(job.key, token):
            return None  # its entry stays pending and comes up again once it is idle
        job = await self.get(job_id)  # it may have ended before the lease was ours
        if job.stage.ended:
            await self._drop(entry, job.key, token)
            return None
        job = replace_job(
            job,
            worker=consumer,
            attempts=job.attempts + 1,
            started_at=job.started_at or time.time(),
        )
        claim = Claim(job=job, entry=entry, token=token)
        if await self._command("HEXISTS", _CANCELS, job_id):
            await self.finish(replace(claim, job=_cancelled(job, "cancelled")))
            return None
        return claim

    async def _end_waiting(self, job: Job, detail: str) -> Job | None:
        """Cancel a job unless somebody is at work on it; the job that ended."""
        token = f"end/{uuid.uuid4().hex}"
        if not await self._lease(job.key, token):
            return None
        job = await self.get(job.id)  # it may have ended before the lease was ours
        if job.stage.ended:
            await self._eval(RELEASE, [_lease(job.key)], [token])
            return None
        entry = await self._command("HGET", self._entries, job.id)
        ended = _cancelled(job, detail)
        claim = Claim(job=ended, entry=entry.decode() if entry else "", token=token)
        return ended if await self.finish(claim) else None

    async def _lease(self, key: str, token: str) -> bool:
        return bool(await self._command("SET", _lease(key), token, "NX", "PX", self._ttl_ms))

    async def _drop(self, entry: str, key: str, token: str) -> None:
        await self._eval(DROP, [self._stream, _lease(key)], [token, GROUP, entry])

    async def _eval(self, script: str, keys: list[str], arguments: list[Any]) -> Any:
        return await self._command("EVAL", script, len(keys), *keys, *arguments)

    async def _command(self, *arguments: Any) -> Any:
        """Run one command. A missing or an existing consumer group raises ``ResponseError``."""
        async with bounded():
            try:
                call = self._client.execute_command(*arguments)  # type: ignore[no-untyped-call]
                return await call
            except ResponseError as error:
                if not str(error).startswith(_GROUP_ERRORS):
                    raise
                group_error = error
        raise group_error


def _cancelled(job: Job, detail: str) -> Job:
    return replace_job(job, stage=Stage.CANCELLED, detail=detail, ended_at=time.time())


def _lease(key: str) -> str:
    return f"precast:capture:{key}"


def _first_entry(entries: Any) -> tuple[str, str] | None:
    """(entry id, job id) of the first entry; Redis 6.2 reports deleted entries as nil."""
    for entry, fields in (item for item in entries or () if item):
        if fields:
            values = fields[b"job"] if isinstance(fields, dict) else fields[1]
            return entry.decode(), values.decode()
    return None
