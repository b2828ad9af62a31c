"""How a model is cut over the ranks of a tensor-parallel group.

A rank takes neighbouring query heads and holds the KV heads that they attend to, so that the
fullest rank has as few columns of the projections as can be, and none caches more KV heads than if
whole ones were dealt. Where they divide over the ranks, whole ones are; else a KV head may be held
by several ranks, each with some of its queries. Ranks that would make no other less full have no
attention. The MLP's columns are dealt evenly, whatever the heads: ranks meet behind each of the
two, so what one waits for behind attention it can't make up for (docs/decisions.md, "Uneven
shards").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

from precast.errors import ConfigError
from precast.models.config import ModelConfig
from precast.ops.layout import GROUP, PANEL

_WHOLE: Final = ("olmo2",)
"""Architectures that norm queries over all heads."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share, as half-open ranges over the whole model."""

    kv_heads: range
    """KV heads that this rank computes and caches; other ranks may hold the same."""
    q_heads: range
    query_groups: tuple[int, ...]
    """For each of ``kv_heads``, how many of ``q_heads`` attend to it."""
    mlp: range
    experts: range
    """Columns of each expert; empty without experts."""
    shared: range
    """Columns of the expert that all tokens go through, likewise."""
    vocab: range
    vocab_widths: tuple[int, ...]
    """Vocabulary rows of each rank, for the gather of logits."""


def shard(config: ModelConfig, rank: int, tp: int) -> Shard:
    """The share of ``rank`` among ``tp`` ranks. Raises ConfigError if there are too few columns."""
    if not 0 <= rank < tp:
        raise ConfigError(f"tp={tp}: a rank {rank} does not exist")
    if tp > 1 and config.architecture in _WHOLE:
        raise ConfigError(f"tp={tp}: a model of {config.architecture} has to be on one rank")
    group = config.q_heads // config.kv_heads
    queries = _deal_queries(config.q_heads, config.kv_heads, tp)[rank]
    kv_heads = _held(queries, group)
    # Groups of a quantised checkpoint's inputs stay whole.
    unit = PANEL if config.scheme is None else GROUP
    columns = _deal(config.intermediate_size, tp, unit)
    vocab = _deal(config.vocab_size, tp, PANEL)
    experts, shared = (
        _deal(size, tp, unit) if size else [0] * tp
        for size in (config.expert_size, config.shared_size)
    )
    return Shard(
        kv_heads=kv_heads,
        q_heads=queries,
        query_groups=tuple(
            len(range(max(queries.start, head * group), min(queries.stop, (head + 1) * group)))
            for head in kv_heads
        ),
        mlp=_range(columns, rank),
        experts=_range(experts, rank),
        shared=_range(shared, rank),
        vocab=_range(vocab, rank),
        vocab_widths=tuple(vocab),
    )


def kv_heads_held(config: ModelConfig, tp: int) -> int:
    """KV heads that ``tp`` ranks keep a cache for, all together."""
    queries = _deal_queries(config.q_heads, config.kv_heads, tp)
    return sum(len(_held(mine, config.q_heads // config.kv_heads)) for mine in queries)


def _held(queries: range, group: int) -> range:
    """The KV heads that these query heads attend to."""
    return range(queries.start // group, -(-queries.stop // group))


def _deal_queries(q_heads: int, kv_heads: int, tp: int) -> list[range]:
    """Each rank's query heads."""
    group = q_heads // kv_heads
    for most in count(2):
        ranks = _fill(q_heads, group, most, -(-kv_heads // tp))
        if len(ranks) <= tp:
            return ranks + [range(q_heads, q_heads)] * (tp - len(ranks))
    raise AssertionError("all heads fit one rank")


def _fill(q_heads: int, group: int, most: int, most_kv: int) -> list[range]:
    """As many query heads to each rank as fit, with at most ``most_kv`` KV heads, into ``most``
    heads: a query head has columns in two projections, a KV head keys and values."""
    ranks, start = list[range](), 0
    while start < q_heads:
        stop = start + 1
        while stop < q_heads:
            held = len(_held(range(start, stop + 1), group))
            if held > most_kv or stop + 1 - start + held > most:
                break
            stop += 1
        ranks.append(range(start, stop))
        start = stop
    return ranks


def _deal(things: int, ways: int, unit: int) -> list[int]:
    """``things`` in nearly equal shares, at least one each, and each share but the last a
    multiple of ``unit`` if there are that many."""
    if things < ways:
        raise ConfigError(f"can't cut {things} columns over {ways} ranks")
    if -(-things // unit) < ways:
        unit = 1
    units = left = -(-things // unit)
    shares: list[int] = []
    for others in reversed(range(ways)):
        mine = int(left / (others + 1) + 0.5)
        shares.append(mine * unit)
        left -= mine
    shares[-1] -= units * unit - things
    return shares


def _range(shares: Sequence[int], rank: int) -> range:
    start = sum(shares[:rank])
    return range(start, start + shares[rank])
