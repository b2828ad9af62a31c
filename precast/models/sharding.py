"""How a model is cut over the ranks of a tensor-parallel group.

A rank takes whole KV heads with their query heads, so head counts that don't divide leave some
ranks with more attention work; the MLP's columns are dealt the other way, so that every rank reads
about as many weight bytes a layer. SmolLM2-135M over two ranks: KV heads 2 and 1, MLP columns 688
and 848.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from precast.errors import ConfigError
from precast.models.config import ModelConfig

PANEL = 16
"""Columns in a packed weight panel (``csrc/kernels.h``): shards are multiples of it."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's share, as half-open ranges over the whole model."""

    kv_heads: range
    q_heads: range
    mlp: range
    vocab: range
    vocab_widths: tuple[int, ...]
    """Vocabulary rows of each rank, for the gather of logits."""


def shard(config: ModelConfig, rank: int, tp: int) -> Shard:
    """The share of ``rank`` among ``tp`` ranks. Raises ConfigError if there are too few heads."""
    if not 1 <= tp <= config.kv_heads:
        raise ConfigError(
            f"tp={tp}: a model with {config.kv_heads} KV heads runs on 1 to {config.kv_heads} ranks"
        )
    kv = _deal(config.kv_heads, [1.0] * tp, 1)
    columns = _deal(config.intermediate_size, _mlp_work(config, kv), PANEL)
    vocab = _deal(config.vocab_size, [1.0] * tp, PANEL)
    group = config.q_heads // config.kv_heads
    heads = _range(kv, rank)
    return Shard(
        kv_heads=heads,
        q_heads=range(heads.start * group, heads.stop * group),
        mlp=_range(columns, rank),
        vocab=_range(vocab, rank),
        vocab_widths=tuple(vocab),
    )


def _mlp_work(config: ModelConfig, kv_heads: Sequence[int]) -> list[float]:
    """Each rank's fair number of MLP columns: its share of all layer weights less its attention."""
    group = config.q_heads // config.kv_heads
    head_weights = config.hidden_size * config.head_dim * (2 * group + 2)
    column_weights = 3 * config.hidden_size
    total = head_weights * config.kv_heads + column_weights * config.intermediate_size
    fair = total / len(kv_heads)
    return [max(0.0, (fair - head_weights * n) / column_weights) for n in kv_heads]


def _deal(count: int, weights: Sequence[float], unit: int) -> list[int]:
    """``count`` things in proportion to ``weights``, each share but the last a multiple of
    ``unit``."""
    units = -(-count // unit)
    if units < len(weights):
        raise ConfigError(f"can't cut {count} columns over {len(weights)} ranks")
    shares: list[int] = []
    left, weight_left = units, sum(weights)
    for index, weight in enumerate(weights):
        others = len(weights) - index - 1
        ideal = -(-left * weight // weight_left) if weight_left > 0 else left
        mine = left if others == 0 else max(1, min(int(ideal), left - others))
        shares.append(mine)
        left -= mine
        weight_left -= weight
    dealt = [n * unit for n in shares]
    dealt[-1] -= units * unit - count
    return dealt


def _range(shares: Sequence[int], rank: int) -> range:
    start = sum(shares[:rank])
    return range(start, start + shares[rank])
