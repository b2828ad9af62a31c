"""``precast workers``: decode workers, and taking one out of service."""

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.table import Table

from precast.cli.compile_link import CALL_TIMEOUT_S, JsonOption, RedisOption
from precast.cli.decode_link import ask_worker, live_workers
from precast.cli.failures import reported
from precast.cli.tables import identifier, output

if TYPE_CHECKING:
    from precast.fleet.leases import DecodeLease

app = typer.Typer(help="Look at decode workers and take one out of service.", no_args_is_help=True)

MAX_DRAIN_S: Final = 3600
WorkerArgument = Annotated[
    str, typer.Argument(metavar="ID", help="A worker's id, or how it begins; HOST:PORT does.")
]


@app.command("list")
@reported
def list_(as_json: JsonOption = False, redis_url: RedisOption = None) -> None:
    """List live decode workers: what they serve, and whether they are in service."""
    leases = asyncio.run(live_workers(redis_url))
    if as_json:
        typer.echo(json.dumps([lease.model_dump(mode="json") for lease in leases], indent=2))
    else:
        output().print(_table(leases))


@app.command()
@reported
def drain(
    worker: WorkerArgument,
    deadline_s: Annotated[
        int,
        typer.Option(
            min=1, max=MAX_DRAIN_S, help="Seconds for running requests; what is left is aborted."
        ),
    ] = 30,
    redis_url: RedisOption = None,
) -> None:
    """Take a worker out of service: it gets no more requests until it is undrained."""
    from precast.proto.decode.v1 import decode_service_pb2 as pb

    request = pb.DrainRequest(deadline_s=deadline_s)
    answer = asyncio.run(
        ask_worker(
            worker,
            redis_url,
            lambda stub: stub.Drain,
            request,
            timeout_s=deadline_s + CALL_TIMEOUT_S,
        )
    )
    typer.echo(f"{worker}  drained: {answer.finished} finished, {answer.aborted} aborted")


@app.command()
@reported
def undrain(worker: WorkerArgument, redis_url: RedisOption = None) -> None:
    """Take a drained worker back into service; its model and graphs are still loaded."""
    from precast.proto.decode.v1 import decode_service_pb2 as pb

    request = pb.UndrainRequest()
    answer = asyncio.run(ask_worker(worker, redis_url, lambda stub: stub.Undrain, request))
    typer.echo(f"{worker}  in service" + ("" if answer.was_drained else ", as it was before"))


def _table(leases: "list[DecodeLease]") -> Table:
    ids = identifier("id", (lease.worker_id for lease in leases))
    rows = Table(ids, "address", "model", "state", "running", "waiting", "graphs")
    for lease in leases:
        graphs, missing = len(lease.graphs), len(lease.captures_wanted)
        rows.add_row(
            *(lease.worker_id, lease.address, lease.model, lease.state),
            *(str(lease.running), str(lease.waiting), f"{graphs}/{graphs + missing}"),
        )
    return rows
