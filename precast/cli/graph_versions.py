"""``precast graphs versions``, ``rollback``, ``pin-version``, ``unpin-version`` and
``lift-quarantine``."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from precast.cli.tables import output

if TYPE_CHECKING:
    import grpc.aio

KeyArgument = Annotated[str, typer.Argument(help="A graph's key, or how it begins.")]


@reported
def versions(
    key: KeyArgument,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """List a graph's versions: which one serves, and what became of the others."""
    from precast.cli import version_tables
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    answer = _call("ListVersions", admin.ListVersionsRequest(), key, address, redis_url)
    if as_json:
        typer.echo(json.dumps(version_tables.to_json(answer.versions), indent=2))
    else:
        output().print(version_tables.table(answer.versions))


@reported
def rollback(
    key: KeyArgument,
    to: Annotated[
        int, typer.Option(min=0, help="Version to go back to; 0: the good one before.")
    ] = 0,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Make workers go back to an earlier version while they serve."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.RollBackGraphRequest(version=to)
    answer = _call("RollBackGraph", request, key, address, redis_url)
    typer.echo(f"{key}  version {answer.version} serves")


@reported
def pin_version(
    key: KeyArgument,
    version: Annotated[int, typer.Argument(min=1)],
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Fix the version that serves: a recompile moves no worker until it is unpinned."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.PinVersionRequest(version=version)
    _call("PinVersion", request, key, address, redis_url)
    typer.echo(f"{key}  version {version} serves, pinned")


@reported
def unpin_version(
    key: KeyArgument, address: AddressOption = None, redis_url: RedisOption = None
) -> None:
    """Let newer versions serve again."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    answer = _call("UnpinVersion", admin.UnpinVersionRequest(), key, address, redis_url)
    typer.echo(f"{key}  version {answer.version} serves")


@reported
def lift_quarantine(
    key: KeyArgument,
    version: Annotated[int, typer.Argument(min=1)],
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Take back a quarantined version; a new crash quarantines it again."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.LiftQuarantineRequest(version=version)
    answer = _call("LiftQuarantine", request, key, address, redis_url)
    typer.echo(f"{key}  version {answer.version} serves")


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
