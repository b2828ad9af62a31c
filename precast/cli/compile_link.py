"""Reaching a compile worker from the command line."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer

from precast.config.settings import CommonSettings, load_settings
from precast.errors import CompilerUnavailable, ConfigError, GraphNotFound

if TYPE_CHECKING:
    import grpc.aio

    from precast.proto.graphs.v1 import graphs_service_pb2 as pb

CALL_TIMEOUT_S: Final = 10.0

AddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="A compile worker; default: one that Redis knows."),
]
RedisOption = Annotated[str | None, typer.Option("--redis-url", metavar="URL")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
_R = TypeVar("_R")


def run(
    call: "Callable[[grpc.aio.Channel], Coroutine[Any, Any, _R]]",
    address: str | None,
    redis_url: str | None,
) -> _R:
    """What ``call`` returns for a channel to a compile worker."""
    settings = load_settings(CommonSettings, redis_url=redis_url)

    async def connected() -> _R:
        async with channel(address, settings) as opened:
            return await call(opened)

    try:
        return asyncio.run(connected())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@asynccontextmanager
async def channel(
    address: str | None, settings: CommonSettings
) -> "AsyncIterator[grpc.aio.Channel]":
    """A channel to a compile worker; failed calls come out as ``PrecastError``."""
    import grpc.aio

    from precast.rpc.server import error_of, open_channel
    from precast.rpc.tls import Role, Tls

    address = address or await registered(settings)
    async with open_channel(address, Tls.load(settings.tls_dir, Role.ADMIN)) as opened:
        try:
            yield opened
        except grpc.aio.AioRpcError as failure:
            error = error_of(failure)
            if failure.code() is grpc.StatusCode.UNAVAILABLE:
                raise CompilerUnavailable(f"compile worker at {address}: {error}") from None
            raise error from None


async def registered(settings: CommonSettings) -> str:
    """The address of a compile worker that has a lease."""
    from precast.fleet.leases import Registry

    registry = Registry.connect(settings.redis_url)
    try:
        workers = await registry.compile_workers()
    finally:
        await registry.close()
    if not workers:
        raise CompilerUnavailable(
            f"no compile worker has a lease in Redis at {settings.redis_url}; is one running?"
        )
    return workers[0].address


def find_graph(graphs: "list[pb.GraphState]", prefix: str) -> "pb.GraphState":
    """The one graph whose key begins so."""
    found = [graph for graph in graphs if graph.key.startswith(prefix)]
    if not found or not prefix:
        raise GraphNotFound(f"no graph has a key that begins with {prefix!r}")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} graphs have keys that begin with {prefix!r}: give more")
    return found[0]


async def list_graphs(
    channel: "grpc.aio.Channel", model: str, num_tokens: int
) -> "list[pb.GraphState]":
    """Graphs of a model and a size; "" and 0: of all."""
    from precast.proto.graphs.v1 import graphs_service_pb2 as pb
    from precast.proto.graphs.v1.graphs_service_pb2_grpc import GraphsServiceStub

    request = pb.ListGraphsRequest(model=model, num_tokens=num_tokens)
    stub: Any = GraphsServiceStub(channel)
    answer = await stub.ListGraphs(request, timeout=CALL_TIMEOUT_S)
    return list(answer.graphs)
