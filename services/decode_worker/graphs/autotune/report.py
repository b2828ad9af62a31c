"""Traffic as ``GetStatus`` tells it."""

from collections.abc import Collection

from precast.proto.decode.v1 import decode_service_pb2 as pb
from services.decode_worker.graphs.autotune.stats import Traffic
from services.decode_worker.graphs.manager import GraphSet


def traffic_report(
    traffic: Traffic, graphs: GraphSet, configured: Collection[int], *, adapts: bool
) -> pb.Traffic:
    wanted, loaded = set(graphs.sizes), graphs.layer_us
    replayed = traffic.replayed.keys() - {0}
    return pb.Traffic(
        decode_steps=traffic.decode,
        prompt_steps=traffic.prompt,
        sizes=[
            pb.GraphSize(
                tokens=size,
                replays=traffic.replayed[size],
                origin=_origin(size, wanted, configured),
                layer_us=loaded.get(size, 0.0),
            )
            for size in sorted(wanted | set(configured) | replayed)
        ],
        live_tokens=traffic.live_tokens,
        padding_tokens=traffic.padding_tokens,
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
