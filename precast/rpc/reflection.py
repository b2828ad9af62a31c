"""Server reflection as v1 and v1alpha: ``grpcio-reflection`` has v1alpha only.

Both versions have the same messages under two package names, so one servicer answers both.
"""

from collections.abc import Iterable
from typing import Any, Final

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import _async, reflection
from grpc_reflection.v1alpha import reflection_pb2 as alpha

_ALPHA_PACKAGE: Final = "grpc.reflection.v1alpha"
_PACKAGE: Final = "grpc.reflection.v1"
SERVICE_NAME: Final = f"{_PACKAGE}.ServerReflection"


def add_reflection(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Let clients ask the server for these services, given by full name."""
    _describe_v1()
    names = [*services, SERVICE_NAME, reflection.SERVICE_NAME]
    servicer: Any = _async.ReflectionServicer(names)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=alpha.ServerReflectionRequest.FromString,
        response_serializer=alpha.ServerReflectionResponse.SerializeToString,
    )
    handlers = [
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        for name in (SERVICE_NAME, reflection.SERVICE_NAME)
    ]
    server.add_generic_rpc_handlers(handlers)


def _describe_v1() -> None:
    """Put v1's descriptor into the pool, for clients that ask for the service's own file."""
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(SERVICE_NAME)
    except KeyError:
        pool.AddSerializedFile(_v1_file().SerializeToString())


def _v1_file() -> descriptor_pb2.FileDescriptorProto:
    """v1alpha's file under v1's names."""
    file = descriptor_pb2.FileDescriptorProto()
    alpha.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = "grpc/reflection/v1/reflection.proto", _PACKAGE
    for message in file.message_type:
        for field in message.field:
            if field.type_name:  # setting it, even to nothing, says that there is one
                field.type_name = field.type_name.replace(_ALPHA_PACKAGE, _PACKAGE)
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(_ALPHA_PACKAGE, _PACKAGE)
        method.output_type = method.output_type.replace(_ALPHA_PACKAGE, _PACKAGE)
    return file
