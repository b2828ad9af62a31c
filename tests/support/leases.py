"""Leases of decode workers that there needn't be."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

from precast.errors import RegistryUnavailable
from precast.fleet.leases import DecodeLease, LoadedGraphRecord, Registry
from precast.graphs.key import spec_digest

_LONG_S: Final = 600.0


def lease(
    worker_id: str,
    *,
    keys: Sequence[str] = (),
    address: str = "127.0.0.1:1",
    wanted: Sequence[int] = (),
    tensor_parallel_size: int = 1,
) -> DecodeLease:
    """Of a worker that runs the first version of these graphs and misses these sizes."""
    graphs = [LoadedGraphRecord(num_tokens=1, keys=(key,), versions=(1,)) for key in keys]
    return DecodeLease(
        worker_id=worker_id,
        address=address,
        model="tiny",
        state="ready",
        max_batch_size=1,
        max_context_length=16,
        weight_dtype="fp32",
        quantization="none",
        graphs=tuple(graphs),
        captures_wanted=tuple(wanted),
        tensor_parallel_size=tensor_parallel_size,
    )


async def publish_asker(redis_url: str, specs: Sequence[Mapping[str, str]]) -> str:
    """The id of a worker that may ask for just these graphs and lives longer than a test: the same
    one for the same graphs. Without Redis it has no lease."""
    digest = spec_digest({str(number): repr(spec) for number, spec in enumerate(specs)})
    sizes = {int(spec["num_tokens"]) for spec in specs if "num_tokens" in spec}
    sizes.update(range(1, len(specs) + 1))  # so that it may have as many graphs as that
    registry = Registry.connect(redis_url, lease_ttl_s=_LONG_S)
    record = lease(f"asker-{digest}", wanted=sorted(sizes))
    record = record.model_copy(
        update={"model": "asked-for", "state": "starting"}
    )  # not for requests
    with suppress(RegistryUnavailable):
        await registry.publish(record)
    await registry.close()
    return record.worker_id
