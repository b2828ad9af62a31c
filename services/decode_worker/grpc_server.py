"""DecodeService: convert, call the worker, convert back."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager, nullcontext
from typing import Any, Final

from precast.errors import InvalidRequest
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1 import decode_service_pb2_grpc as pb_grpc
from precast.rpc.local_link import Handler
from precast.rpc.server import Service, wants_columns, wants_heartbeats
from services.decode_worker.engine.response_buffer import Ending, Outbox, Recipient, Sink
from services.decode_worker.worker import Worker

log = get_logger(__name__)

DEFAULT_DRAIN_S: Final = 30
MAX_DRAIN_S: Final = 3600
HEARTBEAT_S: Final = 1.0


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """``precast.decode.v1.DecodeService``."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        columns, heartbeats = wants_columns(context), wants_heartbeats(context)
        responses = _generate(self._worker, request_iterator, columns, heartbeats)
        async with aclosing(responses):
            async for response in responses:
                yield response

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        return pb.AbortResponse(found=self._worker.abort(request.request_id))

    async def Drain(self, request: pb.DrainRequest, context: Any) -> pb.DrainResponse:
        if request.deadline_s > MAX_DRAIN_S:
            raise InvalidRequest(f"deadline_s = {request.deadline_s}: at most {MAX_DRAIN_S}")
        finished, aborted = await self._worker.drain(request.deadline_s or DEFAULT_DRAIN_S)
        log.info("drained", finished=finished, aborted=aborted)
        return pb.DrainResponse(finished=finished, aborted=aborted)

    async def Undrain(self, request: pb.UndrainRequest, context: Any) -> pb.UndrainResponse:
        was_drained = self._worker.undrain()
        log.info("taken back into service", was_drained=was_drained)
        return pb.UndrainResponse(was_drained=was_drained)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        return self._worker.status()

    async def GetGraphSpecs(
        self, request: pb.GetGraphSpecsRequest, context: Any
    ) -> pb.GetGraphSpecsResponse:
        return self._worker.graph_specs(request.num_tokens)


def local_generate(worker: Worker) -> Handler:
    """Generate for a gateway of the same host, which knows columns and heartbeats."""
    return lambda requests, link: _generate(
        worker, requests, columns=True, heartbeats=True, sink=link
    )


async def _generate(
    worker: Worker,
    requests: AsyncIterator[pb.GenerateRequest],
    columns: bool,
    heartbeats: bool,
    sink: Sink | None = None,
) -> AsyncGenerator[pb.GenerateResponse, None]:
    stream = _Stream(worker, columns=columns)
    if sink is not None:
        stream.outbox.attach(sink)
    reader = asyncio.create_task(stream.read(requests))
    try:
        with stream.beating() if heartbeats else nullcontext():
            async for response in stream.outbox.responses():
                yield response
        if reader.done():
            reader.result()  # raises what it failed with
    finally:
        reader.cancel()
        stream.abort_all()


class _Stream:
    """One Generate call: the requests that came on it and what goes back."""

    def __init__(self, worker: Worker, *, columns: bool) -> None:
        self._worker = worker
        self.outbox = Outbox(columns=columns)
        self._live: set[str] = set()
        self._half_closed = False
        self._next_beat: asyncio.TimerHandle | None = None

    async def read(self, requests: AsyncIterator[pb.GenerateRequest]) -> None:
        """Starts and aborts requests until the client half-closes; the rest is then still sent."""
        try:
            async for request in requests:
                await self.outbox.room()
                self._handle(request)
        finally:
            self._half_closed = True
            self._close_if_done()

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Says meanwhile, every second and when the state changes, that the worker lives."""
        self._worker.watchers.add(self._beat)
        self._beat()
        try:
            yield
        finally:
            self._worker.watchers.discard(self._beat)
            self._cancel_beat()

    def _beat(self) -> None:
        self._cancel_beat()
        self._next_beat = asyncio.get_running_loop().call_later(HEARTBEAT_S, self._beat)
        self.outbox.heartbeat(self._worker.heartbeat())

    def _cancel_beat(self) -> None:
        if self._next_beat is not None:
            self._next_beat.cancel()

    def abort_all(self) -> None:
        for request_id in list(self._live):
            self._worker.abort(request_id)

    def _handle(self, request: pb.GenerateRequest) -> None:
        action = request.WhichOneof("action")
        recipient = Recipient(request_id=request.request_id, handle=request.handle)
        if action == "start":
            self._start(recipient, request.start)
        elif action == "abort":
            if request.request_id in self._live:
                self._worker.abort(request.request_id)
        else:
            code, message = pb.ERROR_CODE_INVALID_ARGUMENT, "a message needs start or abort"
            refusal = pb.GenerationError(code=code, message=message)
            self.outbox.end(Ending(recipient=recipient, end=refusal))

    def _start(self, recipient: Recipient, start: pb.StartGeneration) -> None:
        refusal = self._worker.start(recipient, start, self.outbox, self._ended)
        if refusal is None:
            self._live.add(recipient.request_id)
        else:
            self.outbox.end(refusal)

    def _ended(self, request_id: str) -> None:
        self._live.discard(request_id)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._half_closed and not self._live:
            self.outbox.close()


def service(worker: Worker) -> Service:
    return Service(
        descriptor=pb.DESCRIPTOR.services_by_name["DecodeService"],
        servicer=DecodeServicer(worker),
        add_to_server=pb_grpc.add_DecodeServiceServicer_to_server,
    )
