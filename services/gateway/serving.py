"""One request at the workers: sent, and sent again where nothing of it was shown yet."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from precast.errors import Overloaded, PrecastError, WorkerUnavailable, WorkerUnreachable
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.backoff import Backoff
from services.gateway.metrics import Metrics
from services.gateway.routing.connection import Place
from services.gateway.routing.event_queue import EventQueue
from services.gateway.routing.pool import WorkerPool
from services.gateway.routing.worker import Worker

log = get_logger(__name__)

MAX_ATTEMPTS: Final = 3
"""Workers that may get a request before it fails: it might be what ends them. Those that can't be
reached don't count, for after some crashes most of the known workers may be dead ones."""
FRESH_WAIT_S: Final = 1.0
"""How long a new request waits for a worker to be there."""
LOST_WAIT_S: Final = 10.0
"""How long a request whose worker went away waits for another, or for the same to be back."""
_ROUNDS: Final = Backoff(first_s=0.1, max_s=1.0)
"""Between two looks at all workers."""


@dataclass(kw_only=True)
class _Choice:
    """Where one choice of the request is."""

    start: pb.StartGeneration
    worker: Worker | None = None
    handle: int = 0
    """What the worker's connection calls it."""
    attempts: int = 0
    tried: set[str] = field(default_factory=set)
    """Ids of workers that had it, or could not be reached, in this round."""
    failure: PrecastError | None = None
    """Why it is not at a worker; the last of the reasons."""


class Generation:
    """Sends a request's choices to workers; their events come to ``events``.

    Until a choice has shown any text, one whose worker is full or lost is sent to another worker,
    or to the same once it is back. Use it as an async context manager: leaving it aborts what still
    runs.
    """

    def __init__(
        self,
        pool: WorkerPool,
        metrics: Metrics,
        starts: Sequence[pb.StartGeneration],
        *,
        open_ended: bool = False,
        tokenizer_digest: str = "",
    ) -> None:
        """``open_ended``: a worker that can hold the prompts will do, and gives as many tokens as
        its context has left."""
        self._pool = pool
        self._metrics = metrics
        self._open_ended = open_ended
        self._digest = tokenizer_digest
        self._choices = [_Choice(start=start) for start in starts]
        self._waiting: set[asyncio.Task[None]] = set()
        self.events = EventQueue(len(starts), self._begin_anew)

    async def __aenter__(self) -> Self:
        for index in range(len(self._choices)):
            self._place(index)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.events.close()
        for task in self._waiting:
            task.cancel()
        for choice in self._choices:
            self._forget(choice)
        await asyncio.gather(*self._waiting, return_exceptions=True)

    def _begin_anew(self, index: int, error: PrecastError) -> bool:
        """A choice that has shown nothing has failed: whether it is sent again."""
        choice = self._choices[index]
        if not isinstance(error, Overloaded | WorkerUnavailable):
            return False
        choice.failure = error
        if choice.attempts >= MAX_ATTEMPTS:
            return False
        assert choice.worker is not None, "failed before it was sent"
        choice.tried.add(choice.worker.worker_id)
        self._metrics.retries.labels(choice.start.model).inc()
        log.info("request retried", address=choice.worker.lease.address, reason=str(error))
        self._place(index)
        return True

    def _place(self, index: int) -> None:
        """Send a choice now, or as soon as there is a worker for it."""
        if not self._try(index):
            task = asyncio.create_task(self._keep_trying(index))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)

    async def _keep_trying(self, index: int) -> None:
        choice = self._choices[index]
        wait_s = LOST_WAIT_S if choice.attempts else FRESH_WAIT_S
        end, rounds = time.monotonic() + wait_s, 0
        while (left := end - time.monotonic()) > 0 and self._may_wait(choice):
            rounds += 1
            await self._pool.wait_changed(min(left, _ROUNDS.wait_s(rounds)))
            choice.tried.clear()
            if self._try(index):
                return
        assert choice.failure is not None
        self.events.fail(choice.failure)

    def _may_wait(self, choice: _Choice) -> bool:
        return not isinstance(choice.failure, Overloaded) and not self._pool.stopping

    def _try(self, index: int) -> bool:
        """Whether the choice is at a worker, or can't be at any."""
        choice = self._choices[index]
        while True:
            try:
                worker = self._pick(choice)
            except WorkerUnavailable as error:
                choice.failure = choice.failure or error
                return False
            except PrecastError as error:
                self.events.fail(error)
                return True
            try:
                place = Place(queue=self.events, index=index)
                choice.handle = self._pool.send(worker, choice.start, place)
            except (Overloaded, WorkerUnreachable) as error:
                choice.failure = error
                choice.tried.add(worker.worker_id)
            else:
                choice.worker = worker
                choice.attempts += 1
                return True

    def _pick(self, choice: _Choice) -> Worker:
        start = choice.start
        return self._pool.pick(
            start.model,
            tokens=len(start.prompt_token_ids) + (1 if self._open_ended else start.stop.max_tokens),
            exclude=choice.tried,
            tokenizer_digest=self._digest,
        )

    def _forget(self, choice: _Choice) -> None:
        if choice.worker is not None:
            choice.worker.connection.forget(choice.handle)
