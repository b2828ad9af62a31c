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
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final, Protocol

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
from services.gateway.openai.responses import Usage, encode, encode_text
from services.gateway.openai.token_watch import TokenWatch
from services.gateway.presence import ClientGone, WhileConnected
from services.gateway.request_id import request_id
from services.gateway.routing.event_queue import Delta, Event, EventQueue, TextFollower
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
        self._extra = [(key.encode(), value.encode()) for key, value in headers.items()]
        self._pool = pool
        self._metrics = metrics
        self._started = started
        self._timeout_s = timeout_s

    @cached_property
    def _format(self) -> Format:
        """Made when the workers have got their part already, as ``_watch`` is."""
        return make_format(self._plan)

    @cached_property
    def _watch(self) -> TokenWatch:
        return TokenWatch(self._plan, self._metrics, self._started)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender, span = _Sender(send, writer_of(scope)), span_of(scope)
        for start in self._plan.starts:
            start.trace_id = request_id(scope)
        if span is not None:
            self._trace(span)
        count_tokens(scope, lambda: self._watch.used)
        try:
            async with WhileConnected(scope, receive):
                await self._before_deadline(self._answer(sender))
        except ClientGone:
            self._metrics.disconnects.labels(self._plan.model).inc()
        except Exception as error:
            await self._fail(sender, error)
        finally:
            self._watch.close()
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
        answer = errors.from_any(named_refusal(error, self._plan))
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
            anthropic = self._plan.endpoint == "messages"
            body = answer.anthropic_body() if anthropic else answer.body()
            await sender.body(json.dumps(body).encode(), more=False)
            return
        self._metrics.stream_errors.labels(self._plan.model).inc()
        await sender.body(self._format.failure(answer), more=False)

    async def _answer(self, sender: "_Sender") -> None:
        """Runs the choices, so many at once as fit into a worker's queue: embeddings have more."""
        plan = self._plan
        answer: _Answer | None = None
        for first in range(0, len(plan.starts), MAX_CHOICES):
            starts = plan.starts[first : first + MAX_CHOICES]
            async with self._generation(starts) as generation:
                answer = answer or self._begin(sender)
                await self._run(first, len(starts), generation.events, answer)
        assert answer is not None, "a plan without choices"
        watch = self._watch
        await answer.end(total_usage(plan, watch.ends, watch.reasoning_tokens))

    def _begin(self, sender: "_Sender") -> "_Answer":
        kind = _Stream if self._plan.stream else _Whole
        return kind(len(self._plan.starts), self._format, sender, self._extra)

    async def _run(self, first: int, running: int, queue: EventQueue, answer: "_Answer") -> None:
        """The one loop that every event of the ``running`` choices from the ``first`` on passes, or
        passes by: deltas that come while it waits are shown at once."""
        watch = self._watch

        def follow(index: int, delta: Delta) -> bool:
            if not answer.is_open:
                return False
            watch.see_delta(first + index, delta)
            answer.show_delta(first + index, delta)
            return True

        queue.follow(follow, answer.text_follower(first, watch))
        while running:
            events = await queue.take(WAITING_S)
            if first:
                events = [(first + index, event) for index, event in events]
            for index, event in events:
                watch.see(index, event)
                running -= isinstance(event, pb.GenerationFinished)
            await answer.show(events, last=not running)

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

    def text_follower(self, first: int, watch: TokenWatch) -> TextFollower | None:
        """A shorter way for deltas of text alone, of choices from the ``first`` on, if there is
        one; it tells ``watch`` too."""

    async def show(self, events: Sequence[tuple[int, Event]], *, last: bool) -> None:
        """What has come; nothing for a while if it is empty. ``last``: ``end`` or more choices
        follow at once."""

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

    def text_follower(self, first: int, watch: TokenWatch) -> None:
        return None

    async def show(self, events: Sequence[tuple[int, Event]], *, last: bool) -> None:
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
        self._unsent = b""
        """What is shown with the end."""

    @property
    def is_open(self) -> bool:
        return self._sender.is_open

    def show_delta(self, index: int, delta: Delta) -> None:
        self._sender.write(self._format.delta(index, delta))

    def text_follower(self, first: int, watch: TokenWatch) -> TextFollower | None:
        writer = self._sender.writer
        pieces = [(one.before, one.after) for one in self._format.text_events]
        if writer is None or not pieces:
            return None
        write, see = writer.write, watch.see_tokens

        def follow(index: int, tokens: int, text: str, now: float) -> bool:
            before, after = pieces[first + index]
            if not write(before + encode_text(text) + after):
                return False
            see(first + index, tokens, now)
            return True

        return follow

    async def show(self, events: Sequence[tuple[int, Event]], *, last: bool) -> None:
        data = b"".join([self._event(index, event) for index, event in events])
        if last:
            self._unsent += data
        elif data or not events:
            await self._send(data or WAITING)

    async def end(self, usage: Usage) -> None:
        await self._begin()
        await self._sender.body(self._unsent + self._format.ending(usage), more=False)

    def _event(self, index: int, event: Event) -> bytes:
        opening = b""
        if index not in self._opened:
            self._opened.add(index)
            opening = self._format.opening(index)
        if isinstance(event, pb.GenerationFinished):
            return opening + self._format.closing(index, event)
        return opening + self._format.delta(index, event)

    async def _send(self, data: bytes) -> None:
        await self._begin()
        await self._sender.body(data, more=True)

    async def _begin(self) -> None:
        if not self._sender.started:
            await self._sender.start(200, [*_SSE_HEADERS, *self._extra])


class _Sender:
    """ASGI's ``send``, remembering whether the answer has begun. Raises ``ClientGone``."""

    def __init__(self, send: Send, writer: BodyWriter | None) -> None:
        self._send = send
        self.writer: Final = writer
        self.started = False

    @property
    def is_open(self) -> bool:
        """Whether ``write`` may be called."""
        return self.writer is not None and self.writer.is_open()

    def write(self, piece: bytes) -> None:
        """A piece of the body, without waiting."""
        assert self.writer is not None, "asked for before is_open"
        self.writer.write(piece)

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
