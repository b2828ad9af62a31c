"""Our paged attention in terms of upstream's decode and extend kernels.

Caches are token-major in memory (``kv_cache.new_cache``), so that upstream's [tokens, kv_heads, D]
is a view of them. Rows that only pad a batch never reach upstream, which would write their keys to
slot -1. A window counts the query's own token, here as there, and 0 is none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

_SPLITS: Final = 8
"""Parts of a context, as upstream's scratch tensor wants them."""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Where the tokens and sequences are that are no padding. In lists: small tensors' operators
    take longer than the kernels."""

    rows: list[int] = field(default_factory=list)
    """Of the step's tokens."""
    owners: list[int] = field(default_factory=list)
    """For each of these rows: which sequence it belongs to."""
    seen: list[int] = field(default_factory=list)
    """For each of these rows: how many tokens it attends to, itself the last."""
    sequences: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    """New tokens of each of these sequences."""
    contexts: list[int] = field(default_factory=list)
    """Tokens of each of these sequences, the new ones among them."""


@dataclass(frozen=True, kw_only=True)
class _Cache:
    """What both kernels want of the caches."""

    keys: Tensor
    """[tokens, kv_heads, D], as ``values``."""
    values: Tensor
    slots: Tensor
    """int32 [S, tokens]: of each sequence's context."""


@dataclass(frozen=True, kw_only=True)
class _Options:
    scale: float
    window: int
    softcap: float
    sinks: Tensor | None
    """[heads], in the caches' type."""

    def arguments(self) -> tuple[float, float, bool, int, None, Tensor | None]:
        """The last of both kernels: neither attends to another model's output."""
        return self.scale, self.softcap, False, self.window, None, self.sinks


def paged_attention(
    has_amx: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
    groups: Sequence[int] = (),
    sinks: Tensor | None = None,
) -> Tensor:
    """Prompts go through the extend kernel where AMX is there, else token by token through the
    decode kernel: causality is in the lengths. So do they with a cap, which the extend kernel takes
    but leaves out."""
    assert len(set(groups)) <= 1, "upstream divides query heads evenly"
    keys, values = _token_major(k_cache, v_cache)
    k, v = k.to(keys.dtype).contiguous(), v.to(keys.dtype).contiguous()
    _store(k, v, keys, values, slots)
    plan = _plan(query_starts.tolist(), context_lens.tolist())
    if not plan.rows:
        return torch.zeros(q.shape)
    cache = _Cache(keys=keys, values=values, slots=_slots_of(block_tables, k_cache.shape[3]))
    own = None if sinks is None else sinks.to(keys.dtype).contiguous()
    options = _Options(scale=scale, window=window, softcap=softcap, sinks=own)
    rounded = _rows(q.to(keys.dtype).contiguous(), plan.rows)
    if has_amx and not softcap and max(plan.counts) > 1:
        new = _rows(k, plan.rows), _rows(v, plan.rows)
        result = _extend(rounded, *new, cache, plan, options)
    else:
        result = _decode(rounded, cache, plan, options)
    if len(plan.rows) == len(q):
        return result.float()
    out = torch.zeros(q.shape)
    out[torch.tensor(plan.rows)] = result.float()
    return out


def _plan(starts: list[int], contexts: list[int]) -> _Plan:
    plan = _Plan()
    for sequence, context in enumerate(contexts):
        begin, end = starts[sequence : sequence + 2]
        count = end - begin
        if context == 0 or count == 0:
            continue
        plan.rows.extend(range(begin, end))
        plan.owners.extend([sequence] * count)
        plan.seen.extend(range(context - count + 1, context + 1))
        plan.sequences.append(sequence)
        plan.counts.append(count)
        plan.contexts.append(context)
    return plan


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """No copy for all rows."""
    return x if len(rows) == len(x) else x[torch.tensor(rows, dtype=torch.int64)]


def _store(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    live = [row for row, slot in enumerate(slots.tolist()) if slot >= 0]
    new = _rows(k, live), _rows(v, live)
    torch.ops.sgl_kernel.store_cache_cpu(*new, keys, values, _rows(slots, live), None)


def _decode(q: Tensor, cache: _Cache, plan: _Plan, options: _Options) -> Tensor:
    result = torch.empty_like(q)
    tokens, heads, dim = q.shape
    owners = torch.tensor(plan.owners)
    torch.ops.sgl_kernel.decode_attention_cpu(
        q,
        cache.keys,
        cache.values,
        result,
        None,  # the keys are stored
        None,
        owners,  # nor is read where they would be
        torch.empty(tokens, heads, _SPLITS, dim + 1),
        cache.slots,
        owners,
        torch.tensor(plan.seen),
        *options.arguments(),
    )
    return result


def _extend(
    q: Tensor, k: Tensor, v: Tensor, cache: _Cache, plan: _Plan, options: _Options
) -> Tensor:
    result = torch.empty_like(q)
    counts = torch.tensor(plan.counts, dtype=cache.slots.dtype)
    torch.ops.sgl_kernel.extend_attention_cpu(
        q,
        k,
        v,
        result,
        cache.keys,
        cache.values,
        cache.slots,
        torch.tensor(plan.sequences),
        torch.tensor(plan.contexts),
        counts,
        (counts.cumsum(0) - counts).to(counts.dtype),
        max(plan.counts),
        *options.arguments(),
    )
    return result


def _token_major(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views [blocks * block_size, kv_heads, D]. Raises RuntimeError for other strides."""
    blocks, heads, dim, size = k_cache.shape
    shape = (blocks * size, heads, dim)
    return k_cache.permute(0, 3, 1, 2).view(shape), v_cache.permute(0, 2, 1, 3).view(shape)


def _slots_of(block_tables: Tensor, size: int) -> Tensor:
    """int32 [S, width * size]: the slot of each of a sequence's tokens."""
    slots = block_tables[:, :, None] * size + torch.arange(size, dtype=torch.int32)
    return slots.flatten(1).contiguous()
