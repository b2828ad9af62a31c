"""``precast graphs``: what a compile worker has captured, and capturing it again."""

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from precast.cli.compile_link import (
    AddressOption,
    JsonOption,
    RedisOption,
    find_graph,
    list_graphs,
    run,
)
from precast.cli.failures import EXIT_FAILED, reported
from precast.cli.graph_bundles import export, import_
from precast.cli.graph_explain import explain
from precast.cli.graph_store import gc, resign, scrub
from precast.cli.graph_traffic import traffic
from precast.cli.graph_versions import (
    lift_quarantine,
    pin_version,
    rollback,
    unpin_version,
    versions,
)
from precast.cli.tables import output
from precast.errors import ConfigError

if TYPE_CHECKING:
    import grpc.aio

app = typer.Typer(help="Look at captured graphs and capture them again.", no_args_is_help=True)

app.command()(explain)
app.command()(versions)
app.command()(rollback)
app.command()(pin_version)
app.command()(unpin_version)
app.command()(lift_quarantine)
app.command()(export)
app.command("import")(import_)
app.command()(gc)
app.command()(scrub)
app.command()(resign)
app.command()(traffic)

RECOMPILE_TIMEOUT_S: Final = 3600.0


@app.command("list")
@reported
def list_(
    model: Annotated[str, typer.Option(help="Only graphs asked for by this model.")] = "",
    num_tokens: Annotated[int, typer.Option(min=0, help="Only this size; 0: all.")] = 0,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """List captured, queued and failed graphs."""
    from precast.cli import graph_tables

    graphs = run(lambda channel: list_graphs(channel, model, num_tokens), address, redis_url)
    if as_json:
        typer.echo(graph_tables.to_json(graphs))
    else:
        output().print(graph_tables.graph_table(graphs))


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

    graph = find_graph(run(lambda channel: list_graphs(channel, "", 0), address, redis_url), key)
    if as_json:
        typer.echo(graph_tables.to_json([graph], single=True))
    else:
        output().print(graph_tables.detail(graph))


@app.command()
@reported
def recompile(
    keys: Annotated[list[str] | None, typer.Argument(help="Keys, or how they begin.")] = None,
    model: Annotated[str, typer.Option(help="Every graph of this model.")] = "",
    num_tokens: Annotated[list[int] | None, typer.Option(min=1, help="These sizes.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every graph.")] = False,
    adoption_deadline: Annotated[
        int, typer.Option(min=0, help="Seconds that live workers have to swap; 0: the default.")
    ] = 0,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Capture graphs again and follow until live workers have swapped them in."""
    from precast.proto.admin.v1 import admin_service_pb2 as admin

    if not (keys or model or num_tokens or all_):
        raise ConfigError("say which graphs: KEYS, --model, --num-tokens or --all")
    request = admin.RecompileRequest(
        model=model,
        sizes=num_tokens or [],
        all=all_,
        adoption_deadline_s=adoption_deadline,
    )
    failed = run(
        lambda channel: _recompile(channel, request, keys or [], as_json), address, redis_url
    )
    if failed:
        raise typer.Exit(EXIT_FAILED)


async def _recompile(
    channel: "grpc.aio.Channel", request: Any, prefixes: list[str], as_json: bool
) -> bool:
    """Print each event; whether any job failed."""
    from precast.cli import graph_tables
    from precast.proto.admin.v1.admin_service_pb2_grpc import AdminServiceStub

    if prefixes:
        graphs = await list_graphs(channel, "", 0)
        request.keys.extend(find_graph(graphs, prefix).key for prefix in prefixes)
    failed = False
    stub: Any = AdminServiceStub(channel)
    async for event in stub.Recompile(request, timeout=RECOMPILE_TIMEOUT_S):
        failed |= graph_tables.is_failure(event)
        typer.echo(graph_tables.event_json(event) if as_json else graph_tables.event_line(event))
    return failed
