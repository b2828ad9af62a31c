"""Leases of decode workers that there needn't be."""

from collections.abc import Sequence

from precast.fleet.leases import DecodeLease, LoadedGraphRecord


def lease(worker_id: str, *, keys: Sequence[str] = (), address: str = "127.0.0.1:1") -> DecodeLease:
    """Of a worker that runs the first version of these graphs."""
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
    )
