"""Step statistics as ``GetStatus`` tells it."""

from collections.abc import Collection

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.graphs.autotune.stats import StepStats
from services.decode_worker.graphs.manager import GraphManager


def stats_report(
    stats: StepStats, graphs: GraphManager, configured: Collection[int], *, adapts: bool
) -> pb.Traffic:
    wanted, loaded = set(graphs.sizes), graphs.layer_us
    replayed = stats.replayed.keys() - {0}
    return pb.Traffic(
        decode_steps=stats.decode,
        prompt_steps=stats.prompt,
        sizes=[
            pb.GraphSize(
                tokens=size,
                replays=stats.replayed[size],
                origin=_origin(size, wanted, configured),
                layer_us=loaded.get(size, 0.0),
            )
            for size in sorted(wanted | set(configured) | replayed)
        ],
        live_tokens=stats.live_tokens,
        padding_tokens=stats.padding_tokens,
        adapts=adapts,
    )


def _origin(
    size: int, wanted: Collection[int], configured: Collection[int]
) -> "pb.GraphSizeOrigin.ValueType":
    if size not in wanted:
        return pb.GRAPH_SIZE_ORIGIN_DROPPED
    if size in configured:
        return pb.GRAPH_SIZE_ORIGIN_CONFIGURED
    return pb.GRAPH_SIZE_ORIGIN_ADDED
