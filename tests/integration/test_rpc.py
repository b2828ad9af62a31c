"""The gRPC server builder, over real sockets."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from precast.errors import (
    ConfigError,
    GraphNotFound,
    InvalidRequest,
    Overloaded,
    RegistryUnavailable,
)
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.proto.decode.v1 import decode_service_pb2_grpc as pb_grpc
from precast.rpc.server import Server, Service, error_of, open_channel, start_server

DESCRIPTOR = pb.DESCRIPTOR.services_by_name["DecodeService"]
pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(90)]


class Servicer(pb_grpc.DecodeServiceServicer):
    """Fails on request: a fault that the interceptor has to translate."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.stream_ended = asyncio.Event()

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        if self.error:
            raise self.error
        return pb.GetStatusResponse(worker_id="w")

    async def Generate(
        self, request_iterator: AsyncIterator[pb.GenerateRequest], context: Any
    ) -> AsyncIterator[pb.GenerateResponse]:
        try:
            async for request in request_iterator:
                yield pb.GenerateResponse(request_id=request.request_id)
                if self.error:
                    raise self.error
        finally:
            self.stream_ended.set()


async def serve(servicer: Servicer, listen: str = "127.0.0.1:0") -> Server:
    add = pb_grpc.add_DecodeServiceServicer_to_server
    return await start_server(
        listen, [Service(descriptor=DESCRIPTOR, servicer=servicer, add_to_server=add)]
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidRequest("bad n = 0"), grpc.StatusCode.INVALID_ARGUMENT),
        (GraphNotFound("no graph 77"), grpc.StatusCode.NOT_FOUND),
        (Overloaded("queue is full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (RegistryUnavailable("Redis: gone"), grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_errors_become_statuses_and_back(error: Exception, status: grpc.StatusCode) -> None:
    server = await serve(Servicer(error))
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.DecodeServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as unary:
            await stub.GetStatus(pb.GetStatusRequest(), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as stream:
            async for _ in stub.Generate(iter([pb.GenerateRequest(request_id="1")]), timeout=30):
                pass
    await server.stop(0)
    for failure in (unary.value, stream.value):
        assert (failure.code(), failure.details()) == (status, str(error))
        assert type(error_of(failure)) is type(error)
        assert str(error_of(failure)) == str(error)


async def test_unexpected_exception_is_internal_without_its_text() -> None:
    server = await serve(Servicer(KeyError("secret")))
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.DecodeServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=30)
    await server.stop(0)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error (KeyError)"


async def test_what_is_no_message_is_the_callers_mistake(caplog: pytest.LogCaptureFixture) -> None:
    """Also in the middle of a stream."""
    server = await serve(Servicer())
    good = pb.GenerateRequest(request_id="1").SerializeToString()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        unary: Any = channel.unary_unary(f"/{DESCRIPTOR.full_name}/GetStatus")
        with pytest.raises(grpc.aio.AioRpcError) as one:
            await unary(b"\xff", timeout=30)
        streams: Any = channel.stream_stream(f"/{DESCRIPTOR.full_name}/Generate")
        answers = streams(iter([good, b"\xff"]), timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as other:
            assert [answer async for answer in answers] == []
    await server.stop(0)
    for failure in (one.value, other.value):
        assert failure.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "can't be decoded" in str(failure.details())
    assert "Traceback" not in caplog.text


async def test_cancelled_stream_runs_the_servicers_cleanup() -> None:
    servicer = Servicer()
    server = await serve(servicer)
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        call = pb_grpc.DecodeServiceStub(channel).Generate(timeout=30)
        await call.write(pb.GenerateRequest(request_id="1"))
        assert (await call.read()).request_id == "1"
        call.cancel()
        await asyncio.wait_for(servicer.stream_ended.wait(), 30)
    await server.stop(0)


async def test_health_and_reflection() -> None:
    server = await serve(Servicer())
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert (await health.Check(request, timeout=30)).status == 1
        await server.set_serving(False)
        assert (await health.Check(request, timeout=30)).status == 2
        listing = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=30
        )
        names = {
            service.name
            async for answer in listing
            for service in answer.list_services_response.service
        }
    await server.stop(0)
    assert {"precast.decode.v1.DecodeService", "grpc.health.v1.Health"} <= names


async def test_health_of_each_service_and_of_none() -> None:
    server = await serve(Servicer())
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        named = health_pb2.HealthCheckRequest(service="precast.decode.v1.DecodeService")
        assert (await health.Check(named, timeout=30)).status == 1
        await server.set_serving(False)
        assert (await health.Check(named, timeout=30)).status == 2
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="x"), timeout=30)
    await server.stop(0)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_in_both_versions(version: str) -> None:
    service = f"grpc.reflection.{version}.ServerReflection"
    server = await serve(Servicer())
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        ask: Any = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
        ]
        listing, described = [answer async for answer in ask(iter(requests), timeout=30)]
    await server.stop(0)
    assert service in {each.name for each in listing.list_services_response.service}
    [file] = described.file_descriptor_response.file_descriptor_proto
    assert f"grpc.reflection.{version}".encode() in file


async def test_a_stopped_peer_breaks_its_connection() -> None:
    """A process that was stopped answers no ping, though the kernel keeps its connection open."""
    code = (
        "import asyncio; from tests.integration.test_rpc import Servicer, serve\n"
        "async def main():\n"
        "    server = await serve(Servicer()); print(server.port, flush=True)\n"
        "    await server.wait_for_termination()\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        async with open_channel(f"127.0.0.1:{port}") as channel:
            call = pb_grpc.DecodeServiceStub(channel).Generate()
            await call.write(pb.GenerateRequest(request_id="1"))
            await call.read()
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async with asyncio.timeout(30):
                    await call.read()
        process.kill()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_used_port_is_a_config_error() -> None:
    first = await serve(Servicer())
    with pytest.raises(ConfigError, match=f"127.0.0.1:{first.port}"):
        await serve(Servicer(), f"127.0.0.1:{first.port}")
    await first.stop(0)


async def test_unknown_method_is_unimplemented() -> None:
    server = await start_server("127.0.0.1:0", [])
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pb_grpc.DecodeServiceStub(channel).GetStatus(pb.GetStatusRequest(), timeout=30)
    await server.stop(0)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_large_messages_pass() -> None:
    server = await serve(Servicer())
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = pb_grpc.DecodeServiceStub(channel)
        big = pb.GenerateRequest(request_id="x" * (32 << 20))
        answers = [answer async for answer in stub.Generate(iter([big]), timeout=20)]
    await server.stop(0)
    assert len(answers[0].request_id) == 32 << 20
