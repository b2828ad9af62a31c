"""Answers to generation requests: server-sent events, or one JSON body.

Both watch the connection. A client that leaves ends its generations, which frees their slots.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Final, TypeVar

from msgspec import Struct
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from precast.errors import PrecastError
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.gateway.metrics import Metrics
from services.gateway.openai import errors
from services.gateway.openai.errors import ApiError
from services.gateway.openai.formats import Choice, make_format, usage_of
from services.gateway.openai.prepare import Plan
from services.gateway.openai.responses import encode
from services.gateway.routing.event_queue import Event
from services.gateway.routing.pool import WorkerPool
from services.gateway.serving import generate_all

log = get_logger(__name__)

_DONE: Final = b"data: [DONE]\n\n"
_LAST_WORDS_S: Final = 5.0
"""How long a client may take to read the error that ends its stream."""
_SSE_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
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
    ) -> None:
        super().__init__()
        self._plan = plan
        self._pool = pool
        self._metrics = metrics
        self._started = started
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(send)
        answer = self._stream(sender) if self._plan.stream else self._whole(sender)
        try:
            await unless_disconnected(receive, self._before_deadline(answer))
        except ClientGone:
            self._metrics.disconnects.labels(self._plan.model).inc()
        except Exception as error:
            await self._fail(sender, error)
        finally:
            elapsed = time.monotonic() - self._started
            self._metrics.request_seconds.labels(self._plan.model).observe(elapsed)

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
        answer = errors.from_any(error)
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
        await sender.body(b"data: " + json.dumps(answer.body()).encode() + b"\n\n", more=False)

    async def _whole(self, sender: "_Sender") -> None:
        choices = [Choice() for _ in self._plan.starts]
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if isinstance(event, pb.TokenDelta):
                    choices[index].add(event)
                else:
                    choices[index].finished = event
        tokens = sum(choice.finished.completion_tokens for choice in choices if choice.finished)
        body = encode(make_format(self._plan).whole(choices, usage_of(self._plan, tokens)))
        await sender.start(200, [*_json_headers(), (b"content-length", b"%d" % len(body))])
        await sender.body(body, more=False)

    async def _stream(self, sender: "_Sender") -> None:
        """The status is sent with the first event: what fails before has a status of its own."""
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                if not sender.started:
                    await sender.start(200, _SSE_HEADERS)
                await sender.body(b"data: " + encode(chunk) + b"\n\n", more=True)
        await sender.body(_DONE, more=False)

    async def _chunks(self) -> AsyncGenerator[Struct, None]:
        shown = make_format(self._plan)
        opened: set[int] = set()
        tokens = 0
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if index not in opened:
                    opened.add(index)
                    if (opening := shown.opening(index)) is not None:
                        yield opening
                if isinstance(event, pb.GenerationFinished):
                    tokens += event.completion_tokens
                    yield shown.closing(index, event)
                elif (chunk := shown.delta(index, event)) is not None:
                    yield chunk
        if self._plan.include_usage:
            yield shown.totals(usage_of(self._plan, tokens))

    async def _events(self) -> AsyncGenerator[tuple[int, Event], None]:
        """The plan's events, measured on their way."""
        watch = _TokenWatch(self._plan, self._metrics, self._started)
        async with aclosing(generate_all(self._pool, self._metrics, self._plan.starts)) as events:
            async for index, event in events:
                watch.see(index, event)
                yield index, event


class _TokenWatch:
    """Measures times to and between tokens, and counts them."""

    def __init__(self, plan: Plan, metrics: Metrics, started: float) -> None:
        self._started = started
        self._last: dict[int, float] = {}
        self._first_token = metrics.first_token_seconds.labels(plan.model)
        self._inter_token = metrics.inter_token_seconds.labels(plan.model)
        self._completion_tokens = metrics.completion_tokens.labels(plan.model)
        metrics.prompt_tokens.labels(plan.model).inc(plan.prompt_tokens)

    def see(self, index: int, event: Event) -> None:
        if isinstance(event, pb.GenerationFinished):
            self._completion_tokens.inc(event.completion_tokens)
            return
        now = time.monotonic()
        last = self._last.get(index)
        if last is not None:
            self._inter_token.observe((now - last) / max(1, len(event.token_ids)))
        elif not self._last:
            self._first_token.observe(now - self._started)
        self._last[index] = now


class _Sender:
    """ASGI's ``send``, remembering whether the answer has begun. Raises ``ClientGone``."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = False

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
