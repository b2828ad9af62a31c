"""Answers to generation requests: server-sent events, or one JSON body.

Both watch the connection. A client that leaves ends its generations, which frees their slots.

A stream's status is sent with its first event, so that what fails before has a status of its own;
but after ``WAITING_S`` it is 200 whatever comes, and comments tell the client and the proxies on
the way that the connection is alive.
"""

import asyncio
import json
import time
from collections.abc import Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from precast.errors import PrecastError
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.telemetry import Span, Times
from services.gateway.body_writer import BodyWriter, writer_of
from services.gateway.metrics import Metrics
from services.gateway.openai import errors
from services.gateway.openai.endpoints import make_format
from services.gateway.openai.errors import ApiError
from services.gateway.openai.events import WAITING
from services.gateway.openai.fields import MAX_CHOICES
from services.gateway.openai.formats import Choice, Format, total_usage
from services.gateway.openai.plan import Plan
from services.gateway.openai.refusals import named_refusal
from services.gateway.openai.responses import Usage, encode
from services.gateway.openai.token_watch import TokenWatch
from services.gateway.request_id import request_id
from services.gateway.routing.event_queue import Delta, Event
from services.gateway.routing.pool import WorkerPool
from services.gateway.serving import Generation
from services.gateway.tracing import span_of
from services.gateway.usage import count_tokens

log = get_logger(__name__)

WAITING_S: Final = 5.0
"""How long a stream may be silent before it says that it waits."""
_LAST_WORDS_S: Final = 5.0
"""How long a client may take to read the error that ends its stream."""
_SSE_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_Header = tuple[bytes, bytes]
_T = TypeVar("_T")


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


class GenerationResponse(Response):
    """Runs a plan and answers it. The plan's deadline counts from ``started`` (monotonic, s)."""

    def __init__(
        self,
        plan: Plan,
        pool: WorkerPool,
        metrics: Metrics,
        *,
        started: float,
        timeout_s: float,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``headers``: of an answer that is no error."""
        super().__init__()
        self._plan = plan
        self._format = make_format(plan)
        self._extra = [(key.encode(), value.encode()) for key, value in headers.items()]
        self._pool = pool
        self._metrics = metrics
        self._started = started
        self._timeout_s = timeout_s
        self._watch = TokenWatch(plan, metrics, started)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender, span = _Sender(send, writer_of(scope)), span_of(scope)
        for start in self._plan.starts:
            start.trace_id = request_id(scope)
        if span is not None:
            self._trace(span)
        try:
            await unless_disconnected(receive, self._before_deadline(self._answer(sender)))
        except ClientGone:
            self._metrics.disconnects.labels(self._plan.model).inc()
        except Exception as error:
            await self._fail(sender, error)
        finally:
            count_tokens(scope, self._watch.used)
            if span is not None:
                span.set(self._watch.attributes())
            elapsed = time.monotonic() - self._started
            self._metrics.request_seconds.labels(self._plan.model).observe(elapsed)

    def _trace(self, span: Span) -> None:
        span.record("prepare", Times(began_s=self._started, ended_s=time.monotonic()))
        for start in self._plan.starts:
            start.traceparent = span.traceparent

    async def _before_deadline(self, answer: Coroutine[Any, Any, None]) -> None:
        left = self._started + self._timeout_s - time.monotonic()
        limit = asyncio.timeout(left)
        try:
            async with limit:
                await answer
        except TimeoutError:
            if limit.expired():
                raise errors.timed_out(self._timeout_s) from None
            raise

    async def _fail(self, sender: "_Sender", error: Exception) -> None:
        """Tell the client: with a status if nothing was sent yet, else as the last event."""
        answer = errors.from_any(named_refusal(error, self._plan.constrained_by))
        if answer.status >= 500:
            unexpected = not isinstance(error, ApiError | PrecastError)
            log.warning(
                "request failed",
                endpoint=self._plan.endpoint,
                model=self._plan.model,
                status=answer.status,
                reason=str(error),
                exc_info=error if unexpected else None,
            )
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._send_error(sender, answer)
        except (TimeoutError, ClientGone):
            self._metrics.disconnects.labels(self._plan.model).inc()

    async def _send_error(self, sender: "_Sender", answer: ApiError) -> None:
        if not sender.started:
            headers = [(k.encode(), v.encode()) for k, v in answer.headers.items()]
            await sender.start(answer.status, [*_json_headers(), *headers])
            await sender.body(json.dumps(answer.body()).encode(), more=False)
            return
        self._metrics.stream_errors.labels(self._plan.model).inc()
        await sender.body(self._format.failure(answer.body()), more=False)

    async def _answer(self, sender: "_Sender") -> None:
        """Runs the choices, so many at once as fit into a worker's queue: embeddings have more."""
        plan, watch = self._plan, self._watch
        kind = _Stream if plan.stream else _Whole
        answer: _Answer = kind(len(plan.starts), self._format, sender, self._extra)
        for first in range(0, len(plan.starts), MAX_CHOICES):
            await self._run(first, plan.starts[first : first + MAX_CHOICES], answer)
        await answer.end(total_usage(plan, watch.ends, watch.reasoning_tokens))

    async def _run(
        self, first: int, starts: Sequence[pb.StartGeneration], answer: "_Answer"
    ) -> None:
        """The one loop that every event of some choices, the ``first`` and those behind it, passes,
        or passes by: deltas that come while it waits are shown at once."""
        watch = self._watch
        running = len(starts)

        def follow(index: int, delta: Delta) -> bool:
            if not answer.is_open:
                return False
            watch.see_delta(first + index, delta)
            answer.show_delta(first + index, delta)
            return True

        async with self._generation(starts) as generation:
            generation.events.follow(follow)
            while running:
                events = await generation.events.take(WAITING_S)
                if first:
                    events = [(first + index, event) for index, event in events]
                for index, event in events:
                    watch.see(index, event)
                    running -= isinstance(event, pb.GenerationFinished)
                await answer.show(events)

    def _generation(self, starts: Sequence[pb.StartGeneration]) -> Generation:
        plan = self._plan
        return Generation(
            self._pool,
            self._metrics,
            starts,
            open_ended=plan.open_ended,
            tokenizer_digest=plan.tokenizer_digest,
            session=plan.session and f"{plan.model}/{plan.session}",
        )


class _Answer(Protocol):
    """How the events reach the client."""

    @property
    def is_open(self) -> bool:
        """Whether deltas can be shown at once."""

    def show_delta(self, index: int, delta: Delta) -> None:
        """While ``is_open``; not the first one of its choice."""

    async def show(self, events: Sequence[tuple[int, Event]]) -> None:
        """What has come; nothing for a while if it is empty."""

    async def end(self, usage: Usage) -> None:
        """All choices have finished."""


class _Whole:
    """One JSON body at the end."""

    def __init__(
        self, choices: int, form: Format, sender: "_Sender", headers: Sequence[_Header]
    ) -> None:
        self._format = form
        self._sender = sender
        self._extra = headers
        self._choices = [Choice() for _ in range(choices)]

    @property
    def is_open(self) -> bool:
        return True

    def show_delta(self, index: int, delta: Delta) -> None:
        self._choices[index].add(delta)

    async def show(self, events: Sequence[tuple[int, Event]]) -> None:
        for index, event in events:
            if isinstance(event, Delta):
                self._choices[index].add(event)
            else:
                self._choices[index].finished = event

    async def end(self, usage: Usage) -> None:
        body = encode(self._format.whole(self._choices, usage))
        length = (b"content-length", b"%d" % len(body))
        await self._sender.start(200, [*_json_headers(), length, *self._extra])
        await self._sender.body(body, more=False)


class _Stream:
    """Server-sent events, as they come."""

    def __init__(
        self, choices: int, form: Format, sender: "_Sender", headers: Sequence[_Header]
    ) -> None:
        self._format = form
        self._sender = sender
        self._extra = headers
        self._opened: set[int] = set()

    @property
    def is_open(self) -> bool:
        return self._sender.is_open

    def show_delta(self, index: int, delta: Delta) -> None:
        self._sender.write(self._format.delta(index, delta))

    async def show(self, events: Sequence[tuple[int, Event]]) -> None:
        data = b"".join([self._event(index, event) for index, event in events])
        if data or not events:
            await self._send(data or WAITING)

    async def end(self, usage: Usage) -> None:
        await self._sender.body(self._format.ending(usage), more=False)

    def _event(self, index: int, event: Event) -> bytes:
        opening = b""
        if index not in self._opened:
            self._opened.add(index)
            opening = self._format.opening(index)
        if isinstance(event, pb.GenerationFinished):
            return opening + self._format.closing(index, event)
        return opening + self._format.delta(index, event)

    async def _send(self, data: bytes) -> None:
        if not self._sender.started:
            await self._sender.start(200, [*_SSE_HEADERS, *self._extra])
        await self._sender.body(data, more=True)


class _Sender:
    """ASGI's ``send``, remembering whether the answer has begun. Raises ``ClientGone``."""

    def __init__(self, send: Send, writer: BodyWriter | None) -> None:
        self._send = send
        self._writer = writer
        self.started = False

    @property
    def is_open(self) -> bool:
        """Whether ``write`` may be called."""
        return self._writer is not None and self._writer.is_open

    def write(self, piece: bytes) -> None:
        """A piece of the body, without waiting."""
        assert self._writer is not None, "asked for before is_open"
        self._writer.write(piece)

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = True
        await self._write({"type": "http.response.start", "status": status, "headers": headers})

    async def body(self, body: bytes, *, more: bool) -> None:
        await self._write({"type": "http.response.body", "body": body, "more_body": more})

    async def _write(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # some servers say so where others go on silently
            raise ClientGone from None


def _json_headers() -> list[tuple[bytes, bytes]]:
    return [(b"content-type", b"application/json")]


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of ``work``; it is cancelled when the client leaves first.

    Raises ``ClientGone`` then. The request's body must have been read.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
