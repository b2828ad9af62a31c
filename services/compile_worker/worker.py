"""Claims capture jobs and sees each one through to its end.

A claim is renewed every second while the capture runs. If the renewal finds that the claim is lost
or the job was cancelled, the capture is killed. If Redis can't be reached, the capture goes on:
should somebody else capture the same graph meanwhile, the store takes only the first.
"""

import asyncio
import errno
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from precast.errors import CaptureFailed, PrecastError, RegistryUnavailable, StoreUnavailable
from precast.fleet.queue.asks import Asks, Interest
from precast.fleet.queue.job import Stage, replace_job
from precast.fleet.queue.queue import RENEW_INTERVAL_S, CaptureQueue, Claim, Hold
from precast.graphs.artifacts.manifest import GRAPH_FILE
from precast.graphs.key import spec_part
from precast.log import get_logger
from precast.system.backoff import Backoff
from precast.system.scratch import scratch_folder
from services.compile_worker.failures import Failure, Failures
from services.compile_worker.graphs import Graphs
from services.compile_worker.metrics import Metrics
from services.compile_worker.sandbox.capture import CaptureLimits, run_capture
from services.compile_worker.sandbox.client import ForkServer

log = get_logger(__name__)

MAX_ATTEMPTS: Final = 5
_RETRY: Final = Backoff(first_s=0.5, max_s=5.0)
_FINISH_TRIES: Final = 20
_DISK_FULL: Final = os.strerror(errno.ENOSPC)
"""What compilers say too."""


class Held:
    """A claim while it is worked on: its job's state changes, and whether it is still ours."""

    def __init__(self, claim: Claim, queue: CaptureQueue, consumer: str) -> None:
        self.claim = claim
        self.hold = Hold.HELD
        self.failure: Failure | None = None
        """What was kept of a capture that failed."""
        self.publishing = False
        """Past this point neither a cancellation nor a lost claim stops the job: the store
        decides."""
        self._queue = queue
        self._consumer = consumer
        self._changed = asyncio.Event()

    def update(self, stage: Stage, detail: str = "") -> None:
        """Note how far the job is; others see it at once."""
        job = replace_job(self.claim.job, stage=stage, detail=detail)
        self.claim = replace(self.claim, job=job)
        self._changed.set()

    async def renew(self) -> Hold:
        """Renew now. An outage of Redis counts as still held."""
        self._changed.clear()
        try:
            self.hold = await self._queue.renew(self.claim, self._consumer)
        except RegistryUnavailable as error:
            log.warning("claim not renewed", key=self.claim.job.key, reason=str(error))
        return self.hold

    async def keep(self) -> None:
        """Renew until the claim is no longer held."""
        while await self.renew() is Hold.HELD:
            try:
                async with asyncio.timeout(RENEW_INTERVAL_S):
                    await self._changed.wait()
            except TimeoutError:
                pass


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One line of captures; a compile worker runs ``parallel_captures`` of them."""

    consumer: str
    """Unique in the fleet."""
    graphs: Graphs
    queue: CaptureQueue
    asks: Asks
    server: ForkServer
    """Runs captures."""
    limits: CaptureLimits
    scratch: Path
    failures: Failures
    metrics: Metrics

    async def run(self) -> None:
        """Capture until cancelled."""
        failures = 0
        while True:
            try:
                claim = await self.queue.claim(self.consumer)
            except RegistryUnavailable:
                failures += 1
                await asyncio.sleep(_RETRY.wait_s(failures))
                continue
            failures = 0
            if claim and await self._is_wanted(claim):
                await self._see_through(claim)

    async def _is_wanted(self, claim: Claim) -> bool:
        """Whether to capture it now: a live worker wants it, or it was asked for by hand.

        Of what is left, a job comes up again while its worker may come back, and lapses then.
        """
        try:
            if await self.queue.is_kept(claim.job.id):
                return True
            interest = await self.asks.interest(claim.job.key)
            if interest is Interest.ABSENT:
                await self.queue.put_back(claim)
            elif interest is Interest.NOBODY:
                await self.queue.lapse(claim)
                await self.graphs.lapsed(claim.job)
            return interest is Interest.LIVE
        except RegistryUnavailable:
            return False  # the claim ends by itself

    async def _see_through(self, claim: Claim) -> None:
        job = claim.job
        log.info("capture claimed", key=job.key, num_tokens=job.num_tokens, attempt=job.attempts)
        held = Held(claim, self.queue, self.consumer)
        started = time.monotonic()
        with self.metrics.capturing.track_inprogress():
            try:
                await self._work(held)
            except (StoreUnavailable, OSError) as error:
                await self._end(held, Stage.FAILED, _reason(error))
        outcome = held.claim.job.stage if held.hold is not Hold.LOST else "lost"
        seconds = time.monotonic() - started
        self.metrics.captures.labels(str(outcome)).inc()
        if outcome is Stage.PUBLISHED:
            self.metrics.capture_seconds.observe(seconds)
        log.info(
            "capture ended",
            key=job.key,
            num_tokens=job.num_tokens,
            outcome=str(outcome),
            detail=held.claim.job.detail,
            seconds=round(seconds, 2),
        )

    async def _work(self, held: Held) -> None:
        """Bring a job to its end, or give it up where it was lost."""
        job = held.claim.job
        if await self.graphs.last_version(job.key) >= job.version:
            await self.graphs.versions.refresh(job.key)
            await self._end(held, Stage.PUBLISHED, "was published already")
        elif job.attempts > MAX_ATTEMPTS:
            reason = f"{MAX_ATTEMPTS} compile workers ended while capturing it"
            await self.graphs.failed(job, reason)
            await self._end(held, Stage.FAILED, reason)
        else:
            await self._capture_while_held(held)

    async def _capture_while_held(self, held: Held) -> None:
        capture = asyncio.create_task(self._capture(held))
        keep = asyncio.create_task(held.keep())
        try:
            await asyncio.wait({capture, keep}, return_when=asyncio.FIRST_COMPLETED)
            if held.publishing:
                await asyncio.wait({capture})
        finally:
            capture.cancel()
            keep.cancel()
            results = await asyncio.gather(capture, keep, return_exceptions=True)
        await self._conclude(held, results[0])

    async def _conclude(self, held: Held, result: object) -> None:
        job = held.claim.job
        if result is None:
            await self._end(held, Stage.PUBLISHED)
        elif held.hold is Hold.CANCELLED:
            await self.graphs.cancelled(job)
            await self._end(held, Stage.CANCELLED, "cancelled")
        elif held.hold is Hold.HELD:
            reason = _reason(result)
            if isinstance(result, OSError) or _DISK_FULL in reason:
                log.error("capture can't write", key=job.key, reason=reason)
                await self.graphs.postponed(job, reason)
            else:
                await self.graphs.failed(job, reason, held.failure)
            await self._end(held, Stage.FAILED, reason)

    async def _capture(self, held: Held) -> None:
        """Capture and publish. Returns once published; raises what went wrong."""
        job = held.claim.job
        held.update(Stage.CAPTURING)
        await self.graphs.capturing(job)

        async def on_stage(stage: str) -> None:
            held.update(Stage.CAPTURED if stage == "verifying" else Stage.CAPTURING, stage[:64])

        with scratch_folder(self.scratch, job.key) as folder:
            spec = spec_part(job.factors)
            try:
                report = await run_capture(self.server, spec, folder, self.limits, on_stage)
            except CaptureFailed:
                held.failure = await asyncio.to_thread(self.failures.keep, job, folder)
                raise
            held.update(Stage.VERIFIED, f"largest relative error {report.max_relative_error:.2e}")
            if await held.renew() is not Hold.HELD:
                raise CaptureFailed("no longer this worker's job")
            held.publishing = True
            await self.graphs.publish(job, report, folder / GRAPH_FILE)

    async def _end(self, held: Held, stage: Stage, detail: str = "") -> None:
        """Record the end. If Redis stays away the job comes up again and is found to be done."""
        job = replace_job(held.claim.job, stage=stage, detail=detail, ended_at=time.time())
        held.claim = replace(held.claim, job=job)
        for tries in range(1, _FINISH_TRIES + 1):
            try:
                await self.queue.finish(held.claim)
                return
            except RegistryUnavailable:
                await asyncio.sleep(_RETRY.wait_s(tries))
        log.warning("end of capture not recorded", key=job.key)


def _reason(error: object) -> str:
    """One line; of a file that can't be written, its name."""
    if isinstance(error, OSError) and error.filename:
        return f"can't use {error.filename}: {error.strerror}"
    if isinstance(error, PrecastError | OSError):
        return str(error)
    return f"{error!r}"
