"""gRPC reflection, as grpcurl uses it: services, their messages, and a call made out of these."""

from collections.abc import Callable, Iterator

import grpc
import pytest
from conftest import Server
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from grpc_reflection.v1alpha import reflection_pb2 as pb

DECODE = "precast.decode.v1.DecodeService"
Ask = Callable[[pb.ServerReflectionRequest], pb.ServerReflectionResponse]


@pytest.fixture(params=["v1", "v1alpha"])
def ask(server: Server, request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Both versions have the same messages."""
    with grpc.insecure_channel(server.worker) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{request.param}.ServerReflection/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )
        yield lambda asked: next(call(iter([asked]), timeout=10))


def test_services_are_listed(ask: Ask) -> None:
    found = ask(pb.ServerReflectionRequest(list_services="*")).list_services_response
    names = {service.name for service in found.service}
    assert {DECODE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} <= names


def test_a_call_is_made_out_of_what_reflection_tells(ask: Ask, server: Server) -> None:
    """As ``grpcurl ADDRESS precast.decode.v1.DecodeService/GetStatus`` does."""
    files = ask(pb.ServerReflectionRequest(file_containing_symbol=DECODE)).file_descriptor_response
    pool = descriptor_pool.DescriptorPool()
    for data in files.file_descriptor_proto:
        pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    method = pool.FindServiceByName(DECODE).methods_by_name["GetStatus"]
    request, response = map(
        message_factory.GetMessageClass, (method.input_type, method.output_type)
    )
    with grpc.insecure_channel(server.worker) as channel:
        call = channel.unary_unary(
            f"/{DECODE}/GetStatus",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        assert call(request(), timeout=10).worker_id.startswith("parrot-")


def test_what_is_not_there_is_an_error(ask: Ask) -> None:
    found = ask(pb.ServerReflectionRequest(file_containing_symbol="none.of.these"))
    assert found.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
