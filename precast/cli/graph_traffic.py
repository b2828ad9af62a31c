"""``precast graphs traffic``: what sizes of steps a decode worker runs, and with which graphs."""

import asyncio
import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from precast.cli.compile_link import JsonOption, RedisOption
from precast.cli.decode_link import ask_worker
from precast.cli.failures import reported
from precast.cli.tables import output

if TYPE_CHECKING:
    from precast.proto.decode.v1 import decode_service_pb2 as pb


@reported
def traffic(
    worker: Annotated[
        str, typer.Option(metavar="ID", help="Decode worker; any, if there is one: HOST:PORT does.")
    ] = "",
    as_json: JsonOption = False,
    redis_url: RedisOption = None,
) -> None:
    """Show a decode worker's steps by size, their padding, and which sizes have graphs."""
    from google.protobuf.json_format import MessageToDict

    from precast.proto.decode.v1 import decode_service_pb2 as pb

    request = pb.GetStatusRequest()
    status = asyncio.run(ask_worker(worker, redis_url, lambda stub: stub.GetStatus, request))
    if as_json:
        fields = MessageToDict(
            status.traffic,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
        )
        typer.echo(json.dumps(fields, indent=2, sort_keys=True))
    else:
        output().print(_shown(status))


def _shown(status: "pb.GetStatusResponse") -> RenderableType:
    """A line on the whole, then graphs by size and decode steps by size."""
    seen = status.traffic
    computed = seen.live_tokens + seen.padding_tokens
    padding = f"{seen.padding_tokens / computed:.1%}" if computed else "nothing replayed yet"
    adapts = "adapts" if seen.adapts else "fixed"
    headline = Text(f"{status.worker_id}: padding {padding}; capture set: {adapts}")
    graphs = Table("tokens", "graph", "replays", "layer", title="graphs", title_justify="left")
    for size in seen.sizes:
        layer = f"{size.layer_us:.0f} µs" if size.layer_us else ""
        graphs.add_row(str(size.tokens), _origin(size), str(size.replays), layer)
    steps = Table("tokens", "decode", "with prompts", title="steps", title_justify="left")
    for tokens in sorted({*seen.decode_steps, *seen.prompt_steps}):
        counts = (seen.decode_steps.get(tokens, 0), seen.prompt_steps.get(tokens, 0))
        steps.add_row(str(tokens), *(str(count or "") for count in counts))
    return Group(headline, graphs, steps)


def _origin(size: "pb.GraphSize") -> str:
    from precast.proto.decode.v1 import decode_service_pb2 as pb

    return pb.GraphSizeOrigin.Name(size.origin).removeprefix("GRAPH_SIZE_ORIGIN_").lower()
