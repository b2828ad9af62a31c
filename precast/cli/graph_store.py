"""``precast graphs gc``, ``scrub`` and ``resign``: the store's size, whether it holds what was
signed, and by whom."""

import json
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from precast.cli.compile_link import AddressOption, JsonOption, RedisOption, run
from precast.cli.failures import EXIT_FAILED, reported
from precast.cli.tables import output

if TYPE_CHECKING:
    import grpc.aio

TIMEOUT_S: Final = 600.0
"""Both look at every artifact of the store."""


@reported
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, say what.")] = False,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Remove what exceeds the store's bound: superseded versions, then what nobody runs."""
    from precast.cli import store_tables
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.CollectGarbageRequest(dry_run=dry_run)
    answer = _call("CollectGarbage", request, address, redis_url)
    if as_json:
        typer.echo(json.dumps(store_tables.collected(answer), indent=2))
    else:
        output().print(store_tables.collected_table(answer, dry_run=dry_run))


@reported
def scrub(
    as_json: JsonOption = False, address: AddressOption = None, redis_url: RedisOption = None
) -> None:
    """Read every artifact back and put aside what isn't what was signed; exit code 1 if any."""
    from precast.cli import store_tables
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    answer = _call("ScrubStore", admin.ScrubStoreRequest(), address, redis_url)
    if as_json:
        typer.echo(json.dumps(store_tables.scrubbed(answer), indent=2))
    else:
        output().print(store_tables.scrubbed_table(answer))
    if answer.damaged:
        raise typer.Exit(EXIT_FAILED)


@reported
def resign(
    signer: Annotated[
        list[str] | None, typer.Argument(help="Only what these have signed; none: all trusted.")
    ] = None,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Sign artifacts with the present key, so that another can be revoked; exit code 1 if any is
    left."""
    from precast.cli import store_tables
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    request = admin.ResignGraphsRequest(signers=signer or [])
    answer = _call("ResignGraphs", request, address, redis_url)
    if as_json:
        typer.echo(json.dumps(store_tables.resigned(answer), indent=2))
    else:
        output().print(store_tables.resigned_table(answer))
    if answer.refused:
        raise typer.Exit(EXIT_FAILED)


def _call(method: str, request: Any, address: str | None, redis_url: str | None) -> Any:
    async def call(channel: "grpc.aio.Channel") -> Any:
        from precast.proto.admin.v1.admin_service_pb2_grpc import AdminServiceStub

        stub: Any = AdminServiceStub(channel)
        return await getattr(stub, method)(request, timeout=TIMEOUT_S)

    return run(call, address, redis_url)
