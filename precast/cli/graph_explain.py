"""``precast graphs explain``: why a graph is missing."""

import json
import sys
from pathlib import Path
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
from precast.cli.decode_link import ask_worker
from precast.cli.failures import reported
from precast.cli.tables import output
from precast.errors import ConfigError

if TYPE_CHECKING:
    import grpc.aio

    from precast.proto.graphs.v1 import graphs_service_pb2 as pb


@reported
def explain(
    key: Annotated[str | None, typer.Argument(help="A graph's key, or how it begins.")] = None,
    factors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Factors as a JSON object; - reads stdin."),
    ] = None,
    worker: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Graphs that this decode worker misses; HOST:PORT does."),
    ] = None,
    num_tokens: Annotated[
        int, typer.Option(min=0, help="With --worker: this size, missing or not.")
    ] = 0,
    limit: Annotated[int, typer.Option(min=1, help="Most graphs to compare with.")] = 3,
    as_json: JsonOption = False,
    address: AddressOption = None,
    redis_url: RedisOption = None,
) -> None:
    """Say which published graphs come nearest to a wanted one, and which factors differ."""
    from precast.cli import explain_tables

    if sum(given is not None for given in (key, factors, worker)) != 1:
        raise ConfigError("say which graph: KEY, --factors or --worker")
    specs = [_read_factors(factors)] if factors else []

    async def ask(channel: "grpc.aio.Channel") -> "list[pb.ExplainGraphResponse]":
        wanted = await _worker_specs(worker, num_tokens, redis_url) if worker else specs
        return await _explain(channel, key, wanted, limit)

    answers = run(ask, address, redis_url)
    if as_json:
        typer.echo(explain_tables.to_json(answers))
    else:
        output().print(explain_tables.tables(answers))


def _read_factors(path: Path) -> dict[str, str]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text()
        value = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"factors {path}: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ConfigError(f"factors {path}: not a JSON object of strings")
    return value


async def _explain(
    channel: "grpc.aio.Channel", key: str | None, specs: list[dict[str, str]], limit: int
) -> "list[pb.ExplainGraphResponse]":
    from precast.proto.graphs.v1 import graphs_service_pb2 as pb
    from precast.proto.graphs.v1.graphs_service_pb2_grpc import GraphsServiceStub

    requests = [
        pb.ExplainGraphRequest(spec=pb.GraphSpec(factors=spec), limit=limit) for spec in specs
    ]
    if key is not None:
        graph = find_graph(await list_graphs(channel, "", 0), key)
        requests = [pb.ExplainGraphRequest(key=graph.key, limit=limit)]
    stub: Any = GraphsServiceStub(channel)
    return [await stub.ExplainGraph(request, timeout=CALL_TIMEOUT_S) for request in requests]


async def _worker_specs(
    worker: str, num_tokens: int, redis_url: str | None
) -> list[dict[str, str]]:
    """Factors of the graphs that a decode worker wants. Raises ``WorkerUnavailable``."""
    from precast.proto.decode.v1 import decode_service_pb2 as pb

    request = pb.GetGraphSpecsRequest(num_tokens=num_tokens)
    answer = await ask_worker(worker, redis_url, lambda stub: stub.GetGraphSpecs, request)
    return [dict(wanted.factors) for wanted in answer.wanted]
