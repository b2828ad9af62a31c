"""One capture job: its record, as kept in Redis."""

import enum
import time
import uuid
from typing import Any, Final

import msgspec


class Stage(enum.StrEnum):
    """How far a job is. The first five follow one another; the last three are ends."""

    QUEUED = "queued"
    CAPTURING = "capturing"
    CAPTURED = "captured"
    """Compiled; being compared with eager."""
    VERIFIED = "verified"
    PUBLISHED = "published"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (Stage.PUBLISHED, Stage.FAILED, Stage.CANCELLED)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One capture, as kept in Redis."""

    id: str
    key: str
    factors: dict[str, str]
    """Spec and build factors."""
    models: tuple[str, ...] = ()
    num_tokens: int
    version: int
    """What it will publish. Once that exists the job is done, whoever did it."""
    stage: Stage = Stage.QUEUED
    detail: str = ""
    attempts: int = 0
    """Claims so far; more than one if compile workers died in it."""
    worker: str = ""
    queued_at: float
    """Unix seconds, as are the next two; 0: not yet."""
    started_at: float = 0.0
    ended_at: float = 0.0


def new_job(
    key: str,
    factors: dict[str, str],
    *,
    num_tokens: int,
    version: int,
    models: tuple[str, ...] = (),
) -> Job:
    """A job that has not been queued yet."""
    return Job(
        id=uuid.uuid4().hex[:16],
        key=key,
        factors=factors,
        models=models,
        num_tokens=num_tokens,
        version=version,
        queued_at=time.time(),
    )


def replace_job(job: Job, **changes: Any) -> Job:
    """A copy of the job with these fields changed."""
    return msgspec.structs.replace(job, **changes)


def encode_job(job: Job) -> bytes:
    """The record as JSON."""
    return msgspec.json.encode(job)


def decode_job(record: bytes) -> Job | None:
    """The job, or None if another version wrote something that can't be read."""
    try:
        return _decoder.decode(record)
    except msgspec.DecodeError:
        return None


_decoder: Final = msgspec.json.Decoder(Job)
