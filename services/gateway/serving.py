"""Running generations: on a worker, on another if the first can't, several at once."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from precast.errors import Overloaded, PrecastError, WorkerUnavailable, WorkerUnreachable
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.metrics import Metrics
from services.gateway.routing.event_queue import Event
from services.gateway.routing.pool import Worker, WorkerPool

log = get_logger(__name__)

MAX_ATTEMPTS: Final = 3
"""Workers that may get a request before it fails: it might be what ends them. Those that can't be
reached don't count, for after some crashes most of the known workers may be dead ones."""
_EVENTS_PER_CHOICE: Final = 4


async def generate_all(
    pool: WorkerPool, metrics: Metrics, starts: Sequence[pb.StartGeneration]
) -> AsyncGenerator[tuple[int, Event], None]:
    """Events of all generations with their index. The first error ends them all.

    Closing the iterator aborts what still runs.
    """
    if len(starts) == 1:
        async with aclosing(generate(pool, metrics, starts[0])) as events:
            async for event in events:
                yield 0, event
        return
    async with aclosing(_merged(pool, metrics, starts)) as merged:
        async for pair in merged:
            yield pair


async def _merged(
    pool: WorkerPool, metrics: Metrics, starts: Sequence[pb.StartGeneration]
) -> AsyncGenerator[tuple[int, Event], None]:
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(
        _EVENTS_PER_CHOICE * len(starts)
    )

    async def pump(index: int, start: pb.StartGeneration) -> None:
        try:
            async with aclosing(generate(pool, metrics, start)) as events:
                async for event in events:
                    await queue.put((index, event))
        except Exception as error:  # raised where the queue is read
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index, start)) for index, start in enumerate(starts)]
    try:
        left = len(tasks)
        while left:
            index, event = await queue.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, pb.GenerationFinished)
            yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def generate(
    pool: WorkerPool, metrics: Metrics, start: pb.StartGeneration
) -> AsyncGenerator[Event, None]:
    """One generation: deltas, then finished.

    Until it has given any text, a request whose worker is full or lost goes to another worker:
    tokens that are no whole character yet are held back. Raises the last ``Overloaded`` or
    ``WorkerUnavailable`` when none is left, or whatever else the worker answers.
    """
    tokens = len(start.prompt_token_ids) + start.stop.max_tokens
    tried: set[str] = set()
    attempts = 0
    failure: PrecastError | None = None
    while True:
        worker = _next_worker(pool, start.model, tokens, tried, failure)
        begun = False
        held: list[Event] = []
        try:
            async with aclosing(_attempt(pool, worker, start)) as events:
                async for event in events:
                    held.append(event)
                    begun = begun or not _is_silent(event)
                    while begun and held:
                        yield held.pop(0)
            return
        except (Overloaded, WorkerUnavailable) as error:
            attempts += not isinstance(error, WorkerUnreachable)
            if begun or attempts >= MAX_ATTEMPTS:
                raise
            failure = error
            tried.add(worker.lease.worker_id)
            metrics.retries.labels(start.model).inc()
            log.info("request retried", worker_id=worker.lease.worker_id, reason=str(error))


def _is_silent(event: Event) -> bool:
    return isinstance(event, pb.TokenDelta) and not event.text


def _next_worker(
    pool: WorkerPool, model: str, tokens: int, tried: set[str], failure: PrecastError | None
) -> Worker:
    """A worker that wasn't tried. Raises the last failure if there is none."""
    try:
        return pool.pick(model, tokens=tokens, exclude=tried)
    except PrecastError:
        if failure is not None:
            raise failure from None
        raise


async def _attempt(
    pool: WorkerPool, worker: Worker, start: pb.StartGeneration
) -> AsyncGenerator[Event, None]:
    """The generation's events from one worker."""
    async with pool.running(worker, uuid.uuid4().hex, start) as inbox:
        while True:
            event = await inbox.get()
            if isinstance(event, pb.GenerationFinished):
                _refuse_abort(event)
                yield event
                return
            yield event


def _refuse_abort(finished: pb.GenerationFinished) -> None:
    """We didn't ask for it while we listen, so the worker gave the request up."""
    if finished.reason == pb.FINISH_REASON_ABORTED:
        raise WorkerUnavailable("The worker aborted the request.")
