"""``system_fingerprint``: changes with what answers depend on beside the request."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache

from precast import __version__
from services.gateway.routing.pool import WorkerPool


def fingerprint(pool: WorkerPool, model: str) -> str:
    """Of the model as its workers have it, and of the build."""
    leases = (worker.lease for worker in pool.workers if worker.serves(model))
    found = {(one.tokenizer_digest, one.weight_dtype, one.quantization) for one in leases}
    return _digest(model, tuple(sorted(found)))


@lru_cache(maxsize=64)
def _digest(model: str, leases: Iterable[tuple[str, ...]]) -> str:
    text = "\0".join([__version__, model, *("\0".join(one) for one in leases)])
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
