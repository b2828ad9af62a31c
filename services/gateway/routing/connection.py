"""The connection to one worker: a stream that is kept open, and that all its requests share.

One task reads the stream. A message has what a step gave to all its requests; each gets its part
straight into its queue. When a stream breaks, every request on it goes on elsewhere, or ends with
an error; another is opened at once, then with growing pauses. The worker's heartbeats come on
the stream: one that has sent nothing for ``SILENCE_S`` is taken for hung and disconnected, although
its connection looks sound. To a worker on this host the stream goes over a Unix socket.
"""

import asyncio
import enum
import itertools
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from precast import errors
from precast.errors import Overloaded, PrecastError, WorkerUnavailable, WorkerUnreachable
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.rpc.connect_errors import clear
from precast.rpc.local_link import NO_MESSAGE, LocalLink
from precast.rpc.server import COLUMNS, HEARTBEATS
from precast.rpc.step_tokens import StepTokens, check_columns
from precast.rpc.tls import Tls
from precast.system.backoff import Backoff
from services.gateway.routing.channel import connect, local_link
from services.gateway.routing.event_queue import Delta, EventQueue
from services.gateway.routing.load import Load
from services.gateway.routing.prefixes import Prefix

log = get_logger(__name__)

SILENCE_S: Final = 6.0
"""Longest that a worker which sends heartbeats, one a second, may send nothing."""
RECONNECT: Final = Backoff(first_s=0.1, max_s=1.0)
_TICK_S: Final = 1.0
_MAX_UNSENT: Final = 4096
_HANDLE_MASK: Final = 2**32 - 1
_ERRORS: Final[dict[int, type[PrecastError]]] = {
    pb.ERROR_CODE_INVALID_ARGUMENT: errors.InvalidRequest,
    pb.ERROR_CODE_MODEL_NOT_FOUND: errors.ModelNotFound,
    pb.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED: errors.ContextLengthExceeded,
    pb.ERROR_CODE_OVERLOADED: errors.Overloaded,
    pb.ERROR_CODE_UNAVAILABLE: errors.WorkerUnavailable,
}


_FAILURES: Final = (pb.ERROR_CODE_INTERNAL, pb.ERROR_CODE_UNAVAILABLE)


class Ended(enum.Enum):
    """How a request that was sent has ended."""

    FINISHED = enum.auto()
    FAILED = enum.auto()
    """The worker says that it has failed."""
    LOST = enum.auto()
    """With its connection."""
    LEFT = enum.auto()
    """Nobody wanted it any more, or the worker would not have it."""


@dataclass(kw_only=True, slots=True)
class Place:
    """Where the events of a request go, a choice of an HTTP request, and how far it has come."""

    queue: EventQueue
    index: int
    tokens: list[int] = field(default_factory=list)
    """Those that have come, whichever worker made them."""
    prefix: Prefix
    """What the worker is sent, as the index of prefixes knows it."""
    prompt_left: int = 0
    """Tokens that are to be computed before the first one comes."""
    output_left: int = 0
    """Tokens that will probably come."""

    @property
    def left(self) -> int:
        return self.prompt_left + self.output_left

    def done(self, tokens: int) -> int:
        """Tokens have come: how much of the work is done with them."""
        count = min(tokens, self.output_left)
        self.output_left -= count
        if self.prompt_left and tokens:
            count += self.prompt_left
            self.prompt_left = 0
        return count


class WorkerConnection:
    """Keeps a stream to ``address`` open until closed, and sends requests on it."""

    def __init__(
        self,
        address: str,
        *,
        on_heartbeat: Callable[[pb.Heartbeat], None],
        on_change: Callable[[], None],
        on_end: Callable[[Place, Ended], None],
        load: Load,
        tls: Tls | None = None,
    ) -> None:
        """``on_change`` is called when the stream is there, and when it has broken; ``on_end`` when
        a request that was sent has ended. ``load``: what is done is taken off it."""
        self.address = address
        self._tls = tls
        self.up = False
        """Whether the stream is open, and the worker heard of lately."""
        self.met = False
        """Whether a stream was open at least once."""
        self._on_heartbeat = on_heartbeat
        self._on_change = on_change
        self._load = load
        self._on_end = on_end
        self._places: dict[int, Place] = {}
        """By handle."""
        self._handles = itertools.count(1)
        self._name = uuid.uuid4().hex
        """What the ids of its requests begin with."""
        self._unsent: asyncio.Queue[pb.GenerateRequest] = asyncio.Queue(_MAX_UNSENT)
        self._link: LocalLink | None = None
        """Where the stream goes that is open, if it is not gRPC's."""
        self._heard = 0.0
        self._beats = False
        """Whether this stream's worker sends heartbeats: one of an older version doesn't."""
        self._lost: PrecastError = WorkerUnavailable(
            f"The connection to the worker at {address} was lost."
        )
        self._failures = 0
        self._hurry = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"worker {address}")

    def send(self, start: pb.StartGeneration, place: Place) -> int:
        """Begin a request; returns its handle, for ``forget``.

        Raises ``WorkerUnreachable`` or ``Overloaded``.
        """
        if not self.up:
            raise WorkerUnreachable(f"The worker at {self.address} can't be reached.")
        handle = next(self._handles) & _HANDLE_MASK
        request_id = self._request_id(handle)
        self._enqueue(pb.GenerateRequest(request_id=request_id, handle=handle, start=start))
        self._places[handle] = place
        return handle

    def forget(self, handle: int) -> None:
        """Nobody waits for the request: free its slot at the worker if it still runs."""
        if self._pop(handle, Ended.LEFT) is None:
            return
        abort = pb.GenerateRequest(
            request_id=self._request_id(handle), handle=handle, abort=pb.AbortGeneration()
        )
        with suppress(Overloaded):  # it doesn't read at all, and won't be kept for long
            self._enqueue(abort)

    def hurry(self) -> None:
        """There is news of the worker: connect now if a pause was being made."""
        self._failures = 0
        self._hurry.set()

    async def close(self, reason: PrecastError | None = None) -> None:
        """End the stream, and every request on it with the reason: the worker aborts them."""
        self._lost = reason or self._lost
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _request_id(self, handle: int) -> str:
        return f"{self._name}-{handle}"

    def _pop(self, handle: int, how: Ended) -> Place | None:
        place = self._places.pop(handle, None)
        if place is not None:
            self._on_end(place, how)
        return place

    def _enqueue(self, request: pb.GenerateRequest) -> None:
        if self._link is not None and self._link.is_writable and self._unsent.empty():
            self._link.send(request)  # sooner than a task would
            return
        try:
            self._unsent.put_nowait(request)
        except asyncio.QueueFull:
            raise Overloaded(f"The worker at {self.address} doesn't read its requests.") from None

    async def _run(self) -> None:
        """Connect, serve until the stream breaks, wait, again. Only ``close`` ends it."""
        while True:
            self._hurry.clear()
            try:
                await self._connected()
            except PrecastError as error:
                log.debug("worker not connected", address=self.address, reason=str(error))
            except Exception:
                log.exception("worker connection failed", address=self.address)
            self._failures += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(RECONNECT.wait_s(self._failures)):
                    await self._hurry.wait()

    async def _connected(self) -> None:
        """One stream, from its beginning to its end. Raises ``WorkerUnreachable``."""
        channel = await connect(self.address, self._tls)
        try:
            await self._stream(channel)
        finally:
            self._broken()
            await channel.close(None)

    async def _stream(self, channel: grpc.aio.Channel) -> None:
        # grpc's stubs don't know that an aio channel makes the stub's calls aio calls
        stub: Any = DecodeServiceStub(channel)
        link = await local_link(stub)
        self._link = link
        if link is not None:
            await channel.close(None)  # else its pings would keep gRPC's threads awake
            await self._serve(self._read_locally(link), self._write_locally(link), link.abort)
        else:
            call = _generate(channel)(metadata=[HEARTBEATS, COLUMNS])
            await self._serve(self._read(call), self._write(call), call.cancel)

    async def _serve(
        self,
        read: Coroutine[Any, Any, None],
        write: Coroutine[Any, Any, None],
        cancel: Callable[[], object],
    ) -> None:
        self._unsent = asyncio.Queue(_MAX_UNSENT)
        self._beats, self._heard = False, time.monotonic()
        self.up, self.met, self._failures = True, True, 0
        self._on_change()
        loops = {
            asyncio.create_task(read, name=f"read {self.address}"),
            asyncio.create_task(write, name=f"write {self.address}"),
            asyncio.create_task(self._watch(), name=f"watch {self.address}"),
        }
        try:
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            self._explain([task.exception() for task in done])
        finally:
            cancel()
            for task in loops:
                task.cancel()
            await asyncio.gather(*loops, return_exceptions=True)

    async def _read_locally(self, link: LocalLink) -> None:
        link.deliver(
            lambda message: self._handle(pb.GenerateResponse.FromString(message)),
            self._handle_tokens,
        )
        await asyncio.shield(link.lost)
        raise WorkerUnavailable(f"The worker at {self.address} has closed the connection.")

    async def _write_locally(self, link: LocalLink) -> None:
        unsent = self._unsent
        while True:
            link.send(await unsent.get())
            try:
                await link.writable()
            except TimeoutError:
                reason = f"The worker at {self.address} doesn't read its requests."
                raise WorkerUnavailable(reason) from None

    async def _read(self, call: Any) -> None:
        async for message in call:
            self._handle(pb.GenerateResponse.FromString(message))

    def _handle(self, response: pb.GenerateResponse) -> None:
        """All that comes passes here."""
        self._heard = time.monotonic()
        event = response.WhichOneof("event")
        if event == "step":
            self._step(response.step)
        elif event == "heartbeat":
            self._beats = True
            self._on_heartbeat(response.heartbeat)
        else:
            self._single(response)

    def _step(self, step: pb.StepOutput) -> None:
        """Hand out what a step has made."""
        for prompt in step.prompt_logprobs:
            self._put(prompt.handle, Delta(tokens=0, text="", prompt_logprobs=prompt.tokens))
        reports = {one.handle: one.tokens for one in step.logprobs} if step.logprobs else {}
        token_ids = list(step.token_ids)
        self._columns(step.handles, step.token_counts, token_ids, step.texts, reports)
        for ended in step.ends:
            self._end(ended.handle, ended.finished if ended.HasField("finished") else ended.error)

    def _handle_tokens(self, step: StepTokens) -> None:
        """A step's message that has tokens alone: nearly every one."""
        self._heard = now = time.monotonic()
        places, token_ids, taken, done = self._places, step.token_ids, 0, 0
        for at, handle in enumerate(step.handles):  # a strict zip costs as much as all else here
            count = step.token_counts[at]
            ids = token_ids[taken : taken + count]
            taken += count
            if (place := places.get(handle)) is None:
                continue  # it was aborted meanwhile
            place.tokens += ids
            if place.prompt_left or place.output_left < count:
                done += place.done(count)
            else:  # nearly always
                place.output_left -= count
                done += count
            place.queue.put_text(place.index, ids, step.texts[at], now)
        self._load.left -= done

    def _columns(
        self,
        handles: Sequence[int],
        counts: Sequence[int],
        token_ids: list[int],
        texts: Sequence[str],
        reports: Mapping[int, Sequence[pb.TokenLogprob]],
    ) -> None:
        check_columns(handles, counts, token_ids, texts)
        taken, done = 0, 0
        for handle, count, text in zip(handles, counts, texts, strict=True):
            ids = token_ids[taken : taken + count]
            taken += count
            if (place := self._places.get(handle)) is None:
                continue  # it was aborted meanwhile
            place.tokens += ids
            done += place.done(count)
            logprobs = reports.get(handle, ())
            delta = Delta(tokens=count, text=text, token_ids=ids, logprobs=logprobs)
            place.queue.put(place.index, delta)
        self._load.left -= done

    def _put(self, handle: int, delta: Delta) -> None:
        if (place := self._places.get(handle)) is not None:  # None: it was aborted meanwhile
            place.tokens += delta.token_ids
            self._load.left -= place.done(delta.tokens)
            place.queue.put(place.index, delta)

    def _single(self, response: pb.GenerateResponse) -> None:
        """An event of one request, of a worker that knows no columns."""
        number = response.request_id.rpartition("-")[2]
        handle = int(number) if number.isdecimal() else 0  # of no request of ours
        if response.HasField("delta"):
            self._put(handle, _delta(response.delta))
        else:
            self._end(handle, response.error if response.HasField("error") else response.finished)

    def _end(self, handle: int, end: pb.GenerationFinished | pb.GenerationError) -> None:
        """The last event of a request."""
        if (place := self._pop(handle, _how(end))) is None:
            return
        if isinstance(end, pb.GenerationError):
            place.queue.lose(place.index, _ERRORS.get(end.code, PrecastError)(end.message))
        elif end.reason == pb.FINISH_REASON_ABORTED:
            # We didn't ask for it while somebody waits, so the worker gave the request up.
            place.queue.lose(place.index, WorkerUnavailable("The worker aborted the request."))
        else:
            place.queue.finish(place.index, end)

    async def _write(self, call: Any) -> None:
        unsent = self._unsent
        while True:
            await call.write(await unsent.get())

    async def _watch(self) -> None:
        """Ends when the worker has been silent for too long."""
        while time.monotonic() - self._heard < SILENCE_S or not self._beats:
            before = time.monotonic()
            await asyncio.sleep(_TICK_S)
            if time.monotonic() - before > 2 * _TICK_S:
                self._heard = time.monotonic()  # it is this process that was held up
        raise WorkerUnavailable(f"The worker at {self.address} sent nothing for {SILENCE_S:g} s.")

    def _explain(self, failures: list[BaseException | None]) -> None:
        """Log why the stream has ended."""
        for error in failures:
            reason = str(error)
            if isinstance(error, grpc.aio.AioRpcError):
                reason = f"{error.code().name}: {clear(error.details() or '')}"
            elif isinstance(error, grpc.aio.UsageError | asyncio.InvalidStateError):
                continue  # written to after it ended: the reader says why
            elif error is not None and not isinstance(error, NO_MESSAGE):
                log.error("worker stream failed", address=self.address, exc_info=error)
            log.warning("worker stream lost", address=self.address, reason=reason)

    def _broken(self) -> None:
        if not self.up:
            return
        self.up, self._link = False, None
        for handle in list(self._places):
            if (place := self._pop(handle, Ended.LOST)) is not None:
                place.queue.lose(place.index, self._lost)
        self._on_change()


def _generate(channel: grpc.aio.Channel) -> Any:
    """The method, with responses as bytes: gRPC makes None of what is no message, and a log
    entry."""
    untyped: Any = channel
    return untyped.stream_stream(
        "/precast.decode.v1.DecodeService/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
    )


def _how(end: pb.GenerationFinished | pb.GenerationError) -> Ended:
    if isinstance(end, pb.GenerationError):
        return Ended.FAILED if end.code in _FAILURES else Ended.LEFT
    return Ended.LEFT if end.reason == pb.FINISH_REASON_ABORTED else Ended.FINISHED


def _delta(single: pb.TokenDelta) -> Delta:
    return Delta(
        tokens=len(single.token_ids),
        text=single.text,
        token_ids=list(single.token_ids),
        logprobs=single.logprobs,
    )
