"""One request at the workers: sent, and sent again where its worker is lost."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self

from precast.errors import Overloaded, PrecastError, WorkerUnavailable, WorkerUnreachable
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.backoff import Backoff
from services.gateway.metrics import Metrics
from services.gateway.routing.connection import Place
from services.gateway.routing.event_queue import EventQueue
from services.gateway.routing.policy import Demand
from services.gateway.routing.pool import WorkerPool
from services.gateway.routing.prefixes import Prefix, prefix_of
from services.gateway.routing.progress import Progress
from services.gateway.routing.worker import Worker

log = get_logger(__name__)

FRESH_WAIT_S: Final = 1.0
"""How long a new request waits for a worker to be there."""
LOST_WAIT_S: Final = 10.0
"""How long a request whose worker went away waits for another, or for the same to be back."""
RESUME_WAIT_S: Final = 30.0
"""How long one waits of which tokens have come."""
_ROUNDS: Final = Backoff(first_s=0.1, max_s=1.0)
"""Between two looks at all workers."""


@dataclass(kw_only=True)
class _Choice:
    """Where one choice of the request is."""

    progress: Progress
    worker: Worker | None = None
    handle: int = 0
    """What the worker's connection calls it."""
    build: str = ""
    """Of the worker that made its tokens."""
    prefix: Prefix
    """Of its prompt."""
    tried: set[str] = field(default_factory=set)
    """Ids of workers that had it, or could not be reached, in this round."""
    since: float = 0.0
    """When it was asked for, or its worker was lost last (monotonic, s)."""
    failure: PrecastError | None = None
    """Why it is not at a worker; the last of the reasons."""


class Generation:
    """Sends a request's choices to workers; their events come to ``events``.

    A choice whose worker is full or lost is sent to another worker, or to the same once it is back,
    and goes on behind the tokens that have come. Use it as an async context manager: leaving it
    aborts what still runs.
    """

    def __init__(
        self,
        pool: WorkerPool,
        metrics: Metrics,
        starts: Sequence[pb.StartGeneration],
        *,
        open_ended: bool = False,
        tokenizer_digest: str = "",
        session: str = "",
    ) -> None:
        """``open_ended``: a worker that can hold the prompts will do, and gives as many tokens as
        its context has left. ``session``: requests of the same one go to the same worker."""
        self._pool = pool
        self._metrics = metrics
        self._open_ended = open_ended
        self._digest = tokenizer_digest
        self._session = session
        now = time.monotonic()
        self._choices = [
            _Choice(
                progress=Progress(start=start),
                since=now,
                prefix=prefix_of(start.prompt_token_ids, f"{start.model}\0{start.cache_salt}"),
            )
            for start in starts
        ]
        self._waiting: set[asyncio.Task[None]] = set()
        self.events = EventQueue(len(starts), self._go_on)

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

    def _go_on(self, index: int, error: PrecastError) -> bool:
        """A choice has failed at its worker: whether it is sent again."""
        choice = self._choices[index]
        if not isinstance(error, Overloaded | WorkerUnavailable):
            return False
        choice.failure = error
        if isinstance(error, Overloaded):
            choice.progress.refused()
        else:
            choice.since = time.monotonic()
        if not choice.progress.may_go_on():
            return False
        assert choice.worker is not None, "failed before it was sent"
        choice.tried.add(choice.worker.worker_id)
        self._count_retry(choice, error)
        if not choice.progress.tokens:
            self.events.begin_anew(index)
        self._place(index)
        return True

    def _count_retry(self, choice: _Choice, error: PrecastError) -> None:
        model = choice.progress.start.model
        self._metrics.retries.labels(model).inc()
        if choice.progress.tokens:
            self._metrics.resumptions.labels(model).inc()
        assert choice.worker is not None
        log.info(
            "request retried",
            address=choice.worker.lease.address,
            reason=str(error),
            tokens=len(choice.progress.tokens),
        )

    def _place(self, index: int) -> None:
        """Send a choice now, or as soon as there is a worker for it."""
        if not self._try(index):
            task = asyncio.create_task(self._keep_trying(index))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)

    async def _keep_trying(self, index: int) -> None:
        choice = self._choices[index]
        end, rounds = choice.since + _wait_s(choice.progress), 0
        while (left := end - time.monotonic()) > 0 and self._may_wait(choice):
            rounds += 1
            await self._pool.wait_changed(min(left, _ROUNDS.wait_s(rounds)))
            choice.tried.clear()
            if self._try(index):
                return
        assert choice.failure is not None
        self.events.fail(choice.failure)

    def _may_wait(self, choice: _Choice) -> bool:
        full = isinstance(choice.failure, Overloaded) and not choice.progress.moves
        return not full and not self._pool.stopping

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
                self._send(choice, worker, index)
            except (Overloaded, WorkerUnreachable) as error:
                choice.failure = error
                choice.tried.add(worker.worker_id)
            else:
                return True

    def _send(self, choice: _Choice, worker: Worker, index: int) -> None:
        """Raises ``Overloaded`` or ``WorkerUnreachable``."""
        progress = choice.progress
        if self._open_ended and not progress.tokens:
            progress.limit(worker.lease.max_context_length)
        place = self._new_place(choice, worker, index)
        choice.handle = self._pool.send(worker, progress.next_start(), place)
        self._pool.sessions.sent(self._session, worker.worker_id)
        choice.worker, choice.build = worker, worker.build
        progress.sent()

    def _new_place(self, choice: _Choice, worker: Worker, index: int) -> Place:
        progress = choice.progress
        known = worker.prefixes.found(choice.prefix.hashes)
        return Place(
            queue=self.events,
            index=index,
            tokens=progress.tokens,
            prefix=choice.prefix,
            prompt_left=max(1, progress.length - known),
            output_left=self._expected(progress),
        )

    def _expected(self, progress: Progress) -> int:
        """Tokens that are still to come."""
        return self._pool.usual.expected(progress.start.stop.max_tokens - len(progress.tokens))

    def _pick(self, choice: _Choice) -> Worker:
        """Raises ``WorkerUnavailable`` or ``ModelNotFound``."""
        progress = choice.progress
        whole = progress.prompt_length + progress.start.stop.max_tokens
        least = progress.length + 1
        if not self._open_ended:
            return self._pick_for(choice, whole)
        if progress.tokens:  # one that ends it where the last one would have
            with suppress(WorkerUnavailable):
                return self._pick_for(choice, whole)
        return self._pick_for(choice, least)

    def _pick_for(self, choice: _Choice, tokens: int) -> Worker:
        progress = choice.progress
        demand = Demand(
            tokens=tokens,
            prompt=progress.length,
            output=self._expected(progress),
            resumes=bool(progress.tokens),
            build=choice.build if progress.tokens else "",
            session=self._pool.sessions.worker(self._session),
        )
        return self._pool.pick(
            progress.start.model,
            demand,
            exclude=choice.tried,
            tokenizer_digest=self._digest,
            hashes=choice.prefix.hashes,
        )

    def _forget(self, choice: _Choice) -> None:
        if choice.worker is not None:
            choice.worker.connection.forget(choice.handle)


def _wait_s(progress: Progress) -> float:
    """How long to wait for a worker."""
    if progress.tokens:
        return RESUME_WAIT_S
    return LOST_WAIT_S if progress.moves else FRESH_WAIT_S
