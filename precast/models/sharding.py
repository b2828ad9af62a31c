"""How a model is cut over the ranks of a tensor-parallel group.

With fewer ranks than KV heads, a rank takes whole KV heads with their query heads. With more, a KV
head is held by several ranks, and its query heads are dealt out among them; ranks beyond the number
of query heads have no attention. Either way a rank's query heads divide evenly over its KV heads,
as the attention operator wants. Head counts that don't divide leave some ranks with more
attention. The MLP's columns are dealt evenly nevertheless: ranks meet behind each of the two, so
what one waits for behind attention it can't make up for (docs/decisions.md, "Uneven shards").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from precast.errors import ConfigError
from precast.models.config import ModelConfig

PANEL = 16
"""Columns in a packed weight panel (``csrc/kernels.h``): shards are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share, as half-open ranges over the whole model."""

    kv_heads: range
    """KV heads that this rank computes and caches; other ranks may hold the same."""
    q_heads: range
    mlp: range
    experts: range
    """Columns of each expert; empty without experts."""
    vocab: range
    vocab_widths: tuple[int, ...]
    """Vocabulary rows of each rank, for the gather of logits."""


def shard(config: ModelConfig, rank: int, tp: int) -> Shard:
    """The share of ``rank`` among ``tp`` ranks. Raises ConfigError if there are too few columns."""
    if not 0 <= rank < tp:
        raise ConfigError(f"tp={tp}: a rank {rank} does not exist")
    heads = _deal_heads(config.q_heads, config.kv_heads, tp)
    columns = _deal(config.intermediate_size, tp, PANEL)
    vocab = _deal(config.vocab_size, tp, PANEL)
    experts = _deal(config.expert_size, tp, PANEL) if config.expert_size else [0] * tp
    return Shard(
        kv_heads=heads[rank].kv,
        q_heads=heads[rank].q,
        mlp=_range(columns, rank),
        experts=_range(experts, rank),
        vocab=_range(vocab, rank),
        vocab_widths=tuple(vocab),
    )


def kv_heads_held(config: ModelConfig, tp: int) -> int:
    """KV heads that ``tp`` ranks keep a cache for, all together."""
    return sum(len(heads.kv) for heads in _deal_heads(config.q_heads, config.kv_heads, tp))


class _Heads(NamedTuple):
    q: range
    kv: range


def _deal_heads(q_heads: int, kv_heads: int, tp: int) -> list[_Heads]:
    group = q_heads // kv_heads
    if tp <= kv_heads:
        kv = [_range(_deal(kv_heads, tp, 1), rank) for rank in range(tp)]
        return [_Heads(range(r.start * group, r.stop * group), r) for r in kv]
    heads: list[_Heads] = []
    for head, ranks in enumerate(_deal(min(tp, q_heads), kv_heads, 1)):
        shares = _deal(group, ranks, 1)
        for index in range(ranks):
            mine = _range(shares, index)
            q = range(head * group + mine.start, head * group + mine.stop)
            heads.append(_Heads(q, range(head, head + 1)))
    none = _Heads(range(q_heads, q_heads), range(kv_heads, kv_heads))
    return heads + [none] * (tp - len(heads))


def _deal(count: int, ways: int, unit: int) -> list[int]:
    """``count`` things in nearly equal shares, at least one each, and each share but the last a
    multiple of ``unit`` if there are that many."""
    if count < ways:
        raise ConfigError(f"can't cut {count} columns over {ways} ranks")
    if -(-count // unit) < ways:
        unit = 1
    units = left = -(-count // unit)
    shares: list[int] = []
    for others in reversed(range(ways)):
        mine = int(left / (others + 1) + 0.5)
        shares.append(mine * unit)
        left -= mine
    shares[-1] -= units * unit - count
    return shares


def _range(shares: Sequence[int], rank: int) -> range:
    start = sum(shares[:rank])
    return range(start, start + shares[rank])
