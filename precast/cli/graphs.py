"""``precast graphs``: what a compile worker has captured, and capturing it again."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import typer
from rich.console import Console

from precast.cli.failures import EXIT_FAILED, reported
from precast.errors import CompilerUnavailable, ConfigError, GraphNotFound
from precast.settings import CommonSettings, load_settings

if TYPE_CHECKING:
    import grpc.aio

    from precast.graphs.v1 import graphs_service_pb2 as pb

app = typer.Typer(help="Look at captured graphs and capture them again.", no_args_is_help=True)

CALL_TIMEOUT_S: Final = 10.0
RECOMPILE_TIMEOUT_S: Final = 3600.0

AddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="A compile worker; default: one that Redis knows."),
]
RedisOption = Annotated[str | None, typer.Option("--redis-url", metavar="URL")]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
_R = TypeVar("_R")


@app.command("list")
@reported
def list_(
    model: Annotated[str, typer.Option(help="Only graphs asked for by this model.")] = "",
    batch_size: Annotated[int, typer.Option(min=0, help="Only this size; 0: all.")] = 0,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """List captured, queued and failed graphs."""
    from precast.cli import graph_tables

    graphs = _run(lambda channel: _list(channel, model, batch_size), address, redis_url)
    if as_json:
        typer.echo(graph_tables.to_json(graphs))
    else:
        _console().print(graph_tables.graph_table(graphs))


@app.command()
@reported
def show(
    key: Annotated[str, typer.Argument(help="A graph's key, or how it begins.")],
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Show one graph: its state, measures and every factor of its key."""
    from precast.cli import graph_tables

    graph = _find(_run(lambda channel: _list(channel, "", 0), address, redis_url), key)
    if as_json:
        typer.echo(graph_tables.to_json([graph], single=True))
    else:
        _console().print(graph_tables.detail(graph))


@app.command()
@reported
def recompile(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or how they begin.")] = None,
    model: Annotated[str, typer.Option(help="Every graph of this model.")] = "",
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="These sizes.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every graph.")] = False,
    adoption_deadline: Annotated[
        int, typer.Option(min=0, help="Seconds that live workers have to swap; 0: the default.")
    ] = 0,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Capture graphs again and follow until live workers have swapped them in."""
    from precast.admin.v1 import admin_service_pb2 as admin

    if not (keys or model or batch_size or all_):
        raise ConfigError("say which graphs: KEYS, --model, --batch-size or --all")
    request = admin.RecompileRequest(
        model=model,
        batch_sizes=batch_size or [],
        all=all_,
        adoption_deadline_s=adoption_deadline,
    )
    failed = _run(
        lambda channel: _recompile(channel, request, keys or [], as_json), address, redis_url
    )
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _find(graphs: "list[pb.GraphState]", prefix: str) -> "pb.GraphState":
    found = [graph for graph in graphs if graph.key.startswith(prefix)]
    if not found or not prefix:
        raise GraphNotFound(f"no graph has a key that begins with {prefix!r}")
    if len(found) > 1:
        raise ConfigError(f"{len(found)} graphs have keys that begin with {prefix!r}: give more")
    return found[0]


async def _list(channel: "grpc.aio.Channel", model: str, batch_size: int) -> "list[pb.GraphState]":
    from precast.graphs.v1 import graphs_service_pb2 as pb
    from precast.graphs.v1.graphs_service_pb2_grpc import GraphsServiceStub

    request = pb.ListGraphsRequest(model=model, batch_size=batch_size)
    stub: Any = GraphsServiceStub(channel)
    answer = await stub.ListGraphs(request, timeout=CALL_TIMEOUT_S)
    return list(answer.graphs)


async def _recompile(
    channel: "grpc.aio.Channel", request: Any, prefixes: list[str], as_json: bool
) -> bool:
    """Print each event; whether any job failed."""
    from precast.admin.v1.admin_service_pb2_grpc import AdminServiceStub
    from precast.cli import graph_tables

    if prefixes:
        graphs = await _list(channel, "", 0)
        request.keys.extend(_find(graphs, prefix).key for prefix in prefixes)
    failed = False
    stub: Any = AdminServiceStub(channel)
    async for event in stub.Recompile(request, timeout=RECOMPILE_TIMEOUT_S):
        failed |= graph_tables.is_failure(event)
        typer.echo(graph_tables.event_json(event) if as_json else graph_tables.event_line(event))
    return failed


def _run(
    call: "Callable[[grpc.aio.Channel], Coroutine[Any, Any, _R]]",
    address: str | None,
    redis_url: str | None,
) -> _R:
    settings = load_settings(CommonSettings, redis_url=redis_url)

    async def connected() -> _R:
        async with _channel(address, settings) as channel:
            return await call(channel)

    try:
        return asyncio.run(connected())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


@asynccontextmanager
async def _channel(
    address: str | None, settings: CommonSettings
) -> "AsyncIterator[grpc.aio.Channel]":
    """A channel to a compile worker; failed calls come out as ``PrecastError``."""
    import grpc.aio

    from precast.rpc import error_of, open_channel

    address = address or await _registered(settings)
    async with open_channel(address) as channel:
        try:
            yield channel
        except grpc.aio.AioRpcError as failure:
            error = error_of(failure)
            if failure.code() is grpc.StatusCode.UNAVAILABLE:
                raise CompilerUnavailable(f"compile worker at {address}: {error}") from None
            raise error from None


async def _registered(settings: CommonSettings) -> str:
    from precast.registry import Registry

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


def _console() -> Console:
    return Console(file=sys.stdout)
