"""One ``Generate`` call to one worker, with many requests on it."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import grpc
import grpc.aio

from precast import errors
from precast.errors import Overloaded, PrecastError, WorkerUnavailable, WorkerUnreachable
from precast.log import get_logger
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1.decode_service_pb2_grpc import DecodeServiceStub
from precast.rpc.server import open_channel
from services.gateway.routing.event_queue import Inbox

log = get_logger(__name__)

CONNECT_TIMEOUT_S: Final = 2.0
_MAX_UNSENT: Final = 4096
_ERRORS: Final[dict[int, type[PrecastError]]] = {
    pb.ERROR_CODE_INVALID_ARGUMENT: errors.InvalidRequest,
    pb.ERROR_CODE_MODEL_NOT_FOUND: errors.ModelNotFound,
    pb.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED: errors.ContextLengthExceeded,
    pb.ERROR_CODE_OVERLOADED: errors.Overloaded,
    pb.ERROR_CODE_UNAVAILABLE: errors.WorkerUnavailable,
}


class WorkerStream:
    """An open stream. When it breaks, every request on it ends at once with an error.

    A broken stream stays broken: its owner opens another.
    """

    def __init__(self, channel: grpc.aio.Channel, name: str, on_broken: Callable[[], None]) -> None:
        self._name = name
        self._on_broken = on_broken
        self._inboxes: dict[str, Inbox] = {}
        self._unsent: asyncio.Queue[pb.GenerateRequest] = asyncio.Queue(_MAX_UNSENT)
        # grpc's stubs don't know that an aio channel makes the stub's calls aio calls
        stub: Any = DecodeServiceStub(channel)
        self._call = stub.Generate()
        self.broken = False
        self._tasks = [
            asyncio.create_task(self._guard(self._write()), name=f"write {name}"),
            asyncio.create_task(self._guard(self._read()), name=f"read {name}"),
        ]

    def start(self, request_id: str, start: pb.StartGeneration) -> Inbox:
        """Send a request. Raises ``WorkerUnreachable`` or ``Overloaded``."""
        if self.broken:
            raise WorkerUnreachable(f"The connection to worker {self._name} is broken.")
        self._send(pb.GenerateRequest(request_id=request_id, start=start))
        inbox = self._inboxes[request_id] = Inbox()
        return inbox

    def forget(self, request_id: str) -> None:
        """The request's owner is done with it: free its slot at the worker if it still runs."""
        inbox = self._inboxes.pop(request_id, None)
        if inbox is None or inbox.ended or self.broken:
            return
        try:
            self._send(pb.GenerateRequest(request_id=request_id, abort=pb.AbortGeneration()))
        except Overloaded:
            # A worker that doesn't read for thousands of messages is not worth keeping; breaking
            # the stream makes it abort everything.
            self._break(WorkerUnavailable(f"Worker {self._name} doesn't read its requests."))

    async def close(self) -> None:
        """End the stream: the worker aborts what runs on it."""
        self._break(WorkerUnavailable(f"The connection to worker {self._name} was closed."))
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _send(self, request: pb.GenerateRequest) -> None:
        try:
            self._unsent.put_nowait(request)
        except asyncio.QueueFull:
            raise Overloaded(f"Worker {self._name} doesn't read its requests.") from None

    async def _guard(self, work: Any) -> None:
        """Run a loop of this stream; however it ends, the stream is broken then."""
        lost = WorkerUnavailable(f"The connection to worker {self._name} was lost.")
        try:
            await work
        except grpc.aio.AioRpcError as error:
            log.warning(
                "worker stream lost",
                worker_id=self._name,
                status=error.code().name,
                reason=error.details(),
            )
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            pass  # written to after it ended: the reader says why
        except Exception:
            log.exception("worker stream failed", worker_id=self._name)
        finally:
            self._break(lost)

    async def _write(self) -> None:
        while True:
            await self._call.write(await self._unsent.get())

    async def _read(self) -> None:
        async for response in self._call:
            inbox = self._inboxes.get(response.request_id)
            if inbox is not None:  # else it was aborted meanwhile
                _deliver(inbox, response)

    def _break(self, error: PrecastError) -> None:
        if self.broken:
            return
        self.broken = True
        self._call.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for inbox in self._inboxes.values():
            inbox.end(error)
        self._on_broken()


def _deliver(inbox: Inbox, response: pb.GenerateResponse) -> None:
    match response.WhichOneof("event"):
        case "delta":
            inbox.put(response.delta)
        case "finished":
            inbox.end(response.finished)
        case "error":
            kind = _ERRORS.get(response.error.code, PrecastError)
            inbox.end(kind(response.error.message))


async def connect(address: str) -> grpc.aio.Channel:
    """A connected channel. Raises ``WorkerUnreachable`` after 2 s, or at once if refused."""
    channel = open_channel(address)
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await _until_connected(channel, address)
    except BaseException as error:
        await channel.close(None)
        if isinstance(error, TimeoutError):
            raise WorkerUnreachable(f"The worker at {address} doesn't answer.") from None
        raise
    return channel


async def _until_connected(channel: grpc.aio.Channel, address: str) -> None:
    while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
        if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            raise WorkerUnreachable(f"The worker at {address} can't be reached.")
        await channel.wait_for_state_change(state)
