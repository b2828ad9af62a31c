"""``precast graphs generations``, ``rollback``, ``pin-generation`` and ``unpin-generation``."""

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from precast.cli.compile_link import (
    CALL_TIMEOUT_S,
    AddressOption,
    JsonOption,
    RedisOption,
    find_graph,
    list_graphs,
    run,
)
from precast.cli.failures import reported

if TYPE_CHECKING:
    import grpc.aio

KeyArgument = Annotated[str, typer.Argument(help="A graph's key, or how it begins.")]


@reported
def generations(
    key: KeyArgument,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """List a graph's generations: which one serves, and what became of the others."""
    from precast.cli import generation_tables
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    answer = _call("ListGenerations", admin.ListGenerationsRequest(), key, address, redis_url)
    if as_json:
        typer.echo(json.dumps(generation_tables.to_json(answer.generations), indent=2))
    else:
        Console(file=sys.stdout).print(generation_tables.table(answer.generations))


@reported
def rollback(
    key: KeyArgument,
    to: Annotated[
        int, typer.Option(min=0, help="Generation to go back to; 0: the good one before.")
    ] = 0,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Make workers go back to an earlier generation while they serve."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.RollBackGraphRequest(generation=to)
    answer = _call("RollBackGraph", request, key, address, redis_url)
    typer.echo(f"{key}  generation {answer.generation} serves")


@reported
def pin_generation(
    key: KeyArgument,
    generation: Annotated[int, typer.Argument(min=1)],
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Fix the generation that serves: a recompile moves no worker until it is unpinned."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.PinGenerationRequest(generation=generation)
    _call("PinGeneration", request, key, address, redis_url)
    typer.echo(f"{key}  generation {generation} serves, pinned")


@reported
def unpin_generation(
    key: KeyArgument, address: AddressOption = None, redis_url: RedisOption = None
) -> None:
    """Let newer generations serve again."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    answer = _call("UnpinGeneration", admin.UnpinGenerationRequest(), key, address, redis_url)
    typer.echo(f"{key}  generation {answer.generation} serves")


def _call(
    method: str, request: Any, prefix: str, address: str | None, redis_url: str | None
) -> Any:
    """The admin service's answer to ``request`` for the graph whose key begins so."""

    async def call(channel: "grpc.aio.Channel") -> Any:
        from precast.proto.admin.v1.admin_service_pb2_grpc import AdminServiceStub

        request.key = find_graph(await list_graphs(channel, "", 0), prefix).key
        stub: Any = AdminServiceStub(channel)
        return await getattr(stub, method)(request, timeout=CALL_TIMEOUT_S)

    return run(call, address, redis_url)
