"""gRPC servers and channels, the same everywhere.

A server has the standard health and reflection services and one interceptor that turns errors into
statuses: a ``PrecastError`` into its status with its text, anything else into INTERNAL and a log
entry.
Servicers stay thin: convert, call, convert back, raise.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from precast import errors
from precast.errors import ConfigError, InvalidRequest, PrecastError
from precast.log import get_logger
from precast.rpc.connect_errors import clear
from precast.rpc.reflection import add_reflection
from precast.rpc.tls import NAME, Tls, may_call

log = get_logger(__name__)

_health_aio: Any = health.aio  # type: ignore[attr-defined]  # missing in its stubs

MAX_MESSAGE_BYTES: Final = 64 << 20
_ERROR_METADATA: Final = "precast-error"
"""Trailing metadata that carries the class name of a ``PrecastError`` to the caller."""
HEARTBEATS: Final = ("precast-heartbeats", "1")
"""Metadata of a Generate call that asks for heartbeats on it."""
COLUMNS: Final = ("precast-columns", "1")
"""Metadata of a Generate call that asks for one message a step, in columns."""

_SIZE_OPTIONS: Final = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


def _keepalive(*, time_ms: int) -> list[tuple[str, int]]:
    """Ping after ``time_ms`` without data, and break the connection 3 s later.

    What breaks it is ``ping_timeout_ms``, a minute by default: ``keepalive_timeout_ms`` alone
    leaves a peer that was stopped, or whose host is gone, connected for that long.
    """
    return [
        ("grpc.keepalive_time_ms", time_ms),
        ("grpc.keepalive_timeout_ms", 3_000),
        ("grpc.http2.ping_timeout_ms", 3_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


_SERVER_OPTIONS: Final = [
    *_SIZE_OPTIONS,
    ("grpc.so_reuseport", 0),  # else a second server on a used port starts without an error
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.server_handshake_timeout_ms", 10_000),  # 120 s by default
    *_keepalive(time_ms=20_000),
]
_CHANNEL_OPTIONS: Final = [
    *_SIZE_OPTIONS,
    *_keepalive(time_ms=6_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 0),  # callers decide what is safe to repeat
]

# Most specific first: the first class that an error is an instance of gives its status.
STATUS_OF_ERROR: Final[Sequence[tuple[type[PrecastError], grpc.StatusCode]]] = (
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.WrongState, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.UnsupportedArchitecture, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.CaptureFailed, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.ModelCorrupt, grpc.StatusCode.DATA_LOSS),
    (errors.ArtifactRejected, grpc.StatusCode.DATA_LOSS),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.PrecastError, grpc.StatusCode.INTERNAL),
)


def status_of(error: PrecastError) -> grpc.StatusCode:
    """The gRPC status that stands for an error."""
    return next(status for kind, status in STATUS_OF_ERROR if isinstance(error, kind))


def error_of(failure: grpc.aio.AioRpcError) -> PrecastError:
    """The ``PrecastError`` that a failed call stands for, of the class that the server raised."""
    detail = clear(failure.details() or failure.code().name)
    raised = str(dict(_metadata(failure)).get(_ERROR_METADATA, ""))
    kind = getattr(errors, raised, None)
    if isinstance(kind, type) and issubclass(kind, PrecastError):
        return kind(detail)
    kinds = (kind for kind, status in STATUS_OF_ERROR if status is failure.code())
    return next(kinds, PrecastError)(detail)


def _metadata(failure: grpc.aio.AioRpcError) -> Iterable[tuple[str, str | bytes]]:
    # grpc-stubs doesn't know that the metadata iterates over pairs
    return cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ())


@dataclass(frozen=True, kw_only=True)
class Service:
    """A servicer and how it is added to a server."""

    descriptor: ServiceDescriptor
    """``x_service_pb2.DESCRIPTOR.services_by_name["XService"]``."""
    servicer: object
    add_to_server: Callable[[Any, Any], None]
    """``x_service_pb2_grpc.add_XServiceServicer_to_server``."""


class Server:
    """A running gRPC server. Made by ``start_server``."""

    def __init__(
        self, server: grpc.aio.Server, health_servicer: Any, port: int, services: Sequence[str]
    ) -> None:
        self._server = server
        self._health = health_servicer
        self._services = services
        self.port = port
        """The bound port: the one chosen by the system where ``listen`` said 0."""

    async def set_serving(self, serving: bool) -> None:
        """Report SERVING or NOT_SERVING for the server as a whole and for each of its services."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        for name in ("", *self._services):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float = 5.0) -> None:
        """Refuse new calls at once, let running ones go on for ``grace_s``, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait_for_termination(self) -> None:
        await self._server.wait_for_termination()


async def start_server(
    listen: str, services: Sequence[Service], *, serving: bool = True, tls: Tls | None = None
) -> Server:
    """Start a server of these services, health and reflection at ``listen`` (``host:port``).

    With ``tls`` callers need a certificate, of a role that may call the method. Raises
    ``ConfigError`` if the address can't be bound.
    """
    interceptor = ErrorInterceptor(roles=tls is not None)
    server = grpc.aio.server(interceptors=[interceptor], options=_SERVER_OPTIONS)
    for service in services:
        service.add_to_server(service.servicer, server)
    health_servicer = _health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names = [service.descriptor.full_name for service in services]
    add_reflection([*names, health.SERVICE_NAME], server)
    try:
        port = (
            server.add_secure_port(listen, tls.of_server())
            if tls
            else server.add_insecure_port(listen)
        )
    except RuntimeError:
        raise ConfigError(
            f"listen {listen!r}: can't bind (in use, or not an address here)"
        ) from None
    await server.start()
    running = Server(server, health_servicer, port, names)
    await running.set_serving(serving)
    return running


def wants_heartbeats(context: Any) -> bool:
    """Whether the caller has asked for them."""
    return HEARTBEATS in _metadata_of(context)


def wants_columns(context: Any) -> bool:
    """Whether the caller has asked for them."""
    return COLUMNS in _metadata_of(context)


def _metadata_of(context: Any) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in context.invocation_metadata() or ()]


def open_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """A channel to ``host:port``; its keepalive breaks the connection to a dead or stopped peer
    within 10 s, even when idle."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
    options = [*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", NAME)]
    return grpc.aio.secure_channel(address, tls.of_channel(), options=options)


# grpc's classes are generic in their stubs only
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    _Handler, _Context, _Interceptor = Any, Any, grpc.aio.ServerInterceptor


class ErrorInterceptor(_Interceptor):
    """Turns what a servicer raises into a gRPC status, for all four kinds of call."""

    def __init__(self, *, roles: bool = False) -> None:
        """``roles``: callers need a certificate that may call the method."""
        self._roles = roles

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler:
        handler: _Handler | None = await continuation(handler_call_details)
        # None for an unknown method, which the stubs don't say: gRPC answers UNIMPLEMENTED
        method = str(handler_call_details.method)
        wrapped = handler and _wrapped(handler, method, roles=self._roles)
        return cast("_Handler", wrapped)


def _wrapped(handler: Any, method: str, *, roles: bool) -> _Handler:
    """The same handler with its behaviour guarded."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    attribute, make = kinds[bool(handler.request_streaming), bool(handler.response_streaming)]
    behaviour = getattr(handler, attribute)
    guard = _guard_generator if inspect.isasyncgenfunction(behaviour) else _guard_coroutine
    decode = _decoding(handler.request_deserializer)
    return make(guard(behaviour, method, roles), decode, handler.response_serializer)


_UNDECODABLE: Final = object()
"""In the place of a message that is none: gRPC itself would log a traceback."""


def _decoding(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError:
            return _UNDECODABLE

    return decode


def _decoded(request: Any, method: str) -> Any:
    """A message, or an iterator over such. Raises ``InvalidRequest`` for one that is none."""
    if hasattr(request, "__aiter__"):
        return _each_decoded(request, method)
    if request is _UNDECODABLE:
        raise InvalidRequest(f"{method}: a message can't be decoded")
    return request


async def _each_decoded(requests: AsyncIterator[Any], method: str) -> AsyncIterator[Any]:
    async for request in requests:
        yield _decoded(request, method)


def _guard_coroutine(
    behaviour: Callable[..., Awaitable[Any]], method: str, roles: bool
) -> Callable[..., Any]:
    async def guarded(request: Any, context: _Context) -> Any:
        try:
            if roles:
                await _check_role(context, method)
            return await behaviour(_decoded(request, method), context)
        except Exception as error:
            await _abort(context, error, method)

    return guarded


def _guard_generator(behaviour: Callable[..., Any], method: str, roles: bool) -> Callable[..., Any]:
    async def guarded(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            if roles:
                await _check_role(context, method)
            # aclosing: when the caller goes away, the servicer's cleanup runs now, not at a later
            # garbage collection
            async with aclosing(behaviour(_decoded(request, method), context)) as responses:
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(context, error, method)

    return guarded


async def _check_role(context: _Context, method: str) -> None:
    if not may_call(method, context):
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, f"this certificate's role may not call {method}"
        )


async def _abort(context: _Context, error: Exception, method: str) -> None:
    """End the call with the status that stands for ``error``. Always raises."""
    if isinstance(error, grpc.aio.AbortError):  # the servicer has chosen a status itself
        raise error
    if isinstance(error, PrecastError):
        metadata = ((_ERROR_METADATA, type(error).__name__),)
        await context.abort(status_of(error), str(error), metadata)
    log.exception("call failed unexpectedly", method=method, exc_info=error)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__})")
