"""A gateway's connection to a worker that sends what is no message, or makes no sense."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
import msgspec
import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.local_link import serving_locally
from services.gateway.routing.connection import Ended, Place, WorkerConnection
from services.gateway.routing.event_queue import EventQueue
from services.gateway.routing.load import Load
from services.gateway.routing.prefixes import prefix_of

NAME = "garbage"
DEADLINE_S = 15


def step(**columns: Any) -> bytes:
    return pb.GenerateResponse(step=pb.StepOutput(**columns)).SerializeToString()


def tokens(*columns: Any) -> bytes:
    return msgspec.msgpack.encode(columns)


MESSAGES = {
    "no protobuf": b"\xff" * 9,
    "a handle without a text": step(handles=[1], token_counts=[1], token_ids=[5]),
    "fewer tokens than counted": step(handles=[1], token_counts=[3], token_ids=[5], texts=["a"]),
    "half a text": step(handles=[1], token_counts=[1], token_ids=[5], texts=["ab"])[:-1],
}
COLUMNS = {
    "no tokens": b"\xc1\xc1",
    "a handle without a text": tokens([1], [1], [5], []),
    "fewer tokens than counted": tokens([1], [3], [5], ["a"]),
    "more tokens than counted": tokens([1], [1], [5, 6], ["a"]),
    "a text that is a number": tokens([1], [1], [5], [7]),
}
BEAT = pb.GenerateResponse(heartbeat=pb.Heartbeat(worker_id=NAME, state=pb.WORKER_STATE_READY))


class Liar:
    """Beats, and answers a request with what it was told."""

    def __init__(self, worker_id: str, answer: bytes) -> None:
        self._worker_id = worker_id
        self._answer = answer

    async def GetStatus(self, request: Any, context: Any) -> pb.GetStatusResponse:
        return pb.GetStatusResponse(worker_id=self._worker_id)

    async def generate(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        yield BEAT.SerializeToString()
        async for _ in requests:
            yield self._answer
            yield BEAT.SerializeToString()

    async def local(self, requests: Any, link: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield BEAT
        async for _ in requests:
            link._write(len(self._answer).to_bytes(4, "little") + b"\1" + self._answer)

    async def start(self) -> tuple[grpc.aio.Server, str]:
        server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(self.generate)
        status = grpc.unary_unary_rpc_method_handler(
            self.GetStatus,
            pb.GetStatusRequest.FromString,
            pb.GetStatusResponse.SerializeToString,
        )
        methods = {"Generate": method, "GetStatus": status}
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler("precast.decode.v1.DecodeService", methods)]
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"


async def until(check: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


@dataclass(kw_only=True)
class Seen:
    """What one request and its connection went through."""

    beats: int = 0
    ups: list[bool] = field(default_factory=list)
    ends: list[Ended] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


async def ask(address: str, enough: Callable[[Seen], bool]) -> Seen:
    seen = Seen()

    def beat(_: pb.Heartbeat) -> None:
        seen.beats += 1

    connection: WorkerConnection
    connection = WorkerConnection(
        address,
        on_heartbeat=beat,
        on_change=lambda: seen.ups.append(connection.up),
        on_end=lambda _, how: seen.ends.append(how),
        load=Load(),
    )
    place = Place(queue=EventQueue(1, lambda *_: False), index=0, prefix=prefix_of([1]))
    try:
        await until(lambda: connection.up)
        assert connection.send(pb.StartGeneration(), place) == 1
        await until(lambda: enough(seen))
        seen.tokens += place.tokens
    finally:
        await connection.close()
    return seen


def back(seen: Seen) -> bool:
    """The connection was lost, and is there again."""
    return seen.ups[:3] == [True, False, True]


@pytest.mark.parametrize("what", MESSAGES)
async def test_over_grpc(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    server, address = await Liar("none", MESSAGES[what]).start()
    seen = await ask(address, back)
    assert (seen.ends, seen.tokens) == ([Ended.LOST], [])
    await server.stop(0)
    assert "Traceback" not in "".join(capfd.readouterr())


async def test_what_is_of_no_request_is_passed_over() -> None:
    wrong = pb.GenerateResponse(request_id="x", error=pb.GenerationError(message="?"))
    server, address = await Liar("none", wrong.SerializeToString()).start()
    seen = await ask(address, lambda seen: seen.beats == 2)
    assert seen.ups[0]
    assert seen.ends[:-1] == []  # the last one is that of closing
    await server.stop(0)


@pytest.mark.parametrize("what", COLUMNS)
async def test_over_a_local_socket(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    liar = Liar(NAME, COLUMNS[what])
    async with AsyncExitStack() as stack:
        server, address = await liar.start()
        stack.push_async_callback(server.stop, 0)
        await stack.enter_async_context(serving_locally(NAME, liar.local, bytes))
        seen = await ask(address, back)
        assert (seen.ends, seen.tokens) == ([Ended.LOST], [])
    assert "Traceback" not in "".join(capfd.readouterr())
