"""Why a graph is missing: what comes nearest to it, and in which factors that differs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from precast.errors import GraphNotFound, InvalidRequest
from precast.graphs.key import Differences, key_of_factors, nearest
from services.compile_worker.catalog.entry import GraphRecord
from services.compile_worker.graphs import Graphs

DEFAULT_NEAREST: Final = 3
MAX_NEAREST: Final = 100
MAX_FACTORS: Final = 128
MAX_FACTOR_BYTES: Final = 4096


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A wanted graph and its nearest published neighbours."""

    key: str
    factors: Mapping[str, str]
    record: GraphRecord | None
    """What is known of the wanted graph itself."""
    near: list[tuple[GraphRecord, Differences]]


def explain_key(graphs: Graphs, key: str, limit: int) -> Explanation:
    """Raises ``GraphNotFound`` for a key that nobody has asked for."""
    record = graphs.index.get(key)
    if record is None:
        raise GraphNotFound(f"no graph {key[:64]!r}; give its factors instead")
    return _explain(graphs, record.factors, limit)


def explain_factors(graphs: Graphs, factors: Mapping[str, str], limit: int) -> Explanation:
    """Factors need not be valid: one that is missing or unknown is a difference like any other.

    Build factors that are not given are this worker's. Raises ``InvalidRequest`` where there are
    too many or too long ones.
    """
    size = max((len(name) + len(value) for name, value in factors.items()), default=0)
    if not factors or len(factors) > MAX_FACTORS or size > MAX_FACTOR_BYTES:
        raise InvalidRequest(
            f"{len(factors)} factors: 1 to {MAX_FACTORS} of {MAX_FACTOR_BYTES} bytes may be given"
        )
    return _explain(graphs, {**graphs.build, **factors}, limit)


def _explain(graphs: Graphs, factors: Mapping[str, str], limit: int) -> Explanation:
    published = {record.key: record for record in graphs.index.records() if record.version}
    others = {key: record.factors for key, record in published.items()}
    key = key_of_factors(factors)
    found = nearest(factors, others, min(limit or DEFAULT_NEAREST, MAX_NEAREST))
    return Explanation(
        key=key,
        factors=factors,
        record=graphs.index.get(key),
        near=[(published[name], differences) for name, differences in found],
    )
