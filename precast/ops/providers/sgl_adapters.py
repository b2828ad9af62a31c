"""Our operators in terms of upstream's: layouts, types and mutation.

Hidden states are float32 between our operators; upstream's take and give ``dtype`` (bfloat16 or
float16), but for a linear's bias, which is float32. Everything is checked or made right here: rows
that only pad a batch never reach upstream, which would write their keys to slot -1.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from precast.ops.packing import Format, quantize_int8

_ROWS: Final = 16
_COLUMNS: Final = 32
"""Upstream's packed weights come in tiles of these sizes."""
_SPLITS: Final = 8
"""Parts of a context, as upstream's scratch tensor wants them."""


def rms_norm(dtype: torch.dtype, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = torch.ops.sgl_kernel.rmsnorm_cpu(rows, weight.to(dtype).contiguous(), eps)
    return out.float().view(x.shape)


def silu_and_mul(dtype: torch.dtype, gate_up: Tensor) -> Tensor:
    out: Tensor = torch.ops.sgl_kernel.silu_and_mul_cpu(gate_up.to(dtype).contiguous())
    return out.float()


def rotary(dtype: torch.dtype, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, D]. Upstream rotates queries and keys in one call, in place where they are 2-D,
    and looks positions up: here the table has one row a token, and the key is a stand-in."""
    tokens, heads, dim = x.shape
    # A copy, which upstream overwrites and returns as an alias that its schema doesn't declare.
    query = x.to(dtype, copy=True).reshape(tokens, heads * dim).contiguous()
    key = torch.zeros(tokens, dim, dtype=dtype)
    table = torch.cat((cos, sin), dim=1).to(dtype)
    positions = torch.arange(tokens)
    torch.ops.sgl_kernel.rotary_embedding_cpu(positions, query, key, dim, table, True)
    return query.float().view(tokens, heads, dim)


def pack(weight: Tensor, fmt: Format) -> Tensor:
    """Float [N, K] to uint8 [1, bytes]: upstream's packed weight, then int8's scales."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % _COLUMNS, 0, -n % _ROWS))
    convert = torch.ops.sgl_kernel.convert_weight_packed
    if fmt == Format.INT8:
        quantized, scales = quantize_int8(padded)
        parts = [convert(quantized.contiguous()), scales]
    else:
        parts = [convert(padded.to(_float(fmt)).contiguous())]
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])[None]


def linear(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    format: int,
) -> Tensor:
    fmt = Format(format)
    rows = -(-out_features // _ROWS) * _ROWS
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % _COLUMNS))
    if bias is not None:
        bias = torch.nn.functional.pad(bias.float(), (0, rows - out_features)).contiguous()
    if fmt == Format.INT8:
        y = _int8_linear(x.to(dtype).contiguous(), weight, bias, rows)
    else:
        packed = weight.view(_float(fmt)).view(rows, x.shape[1])
        values = x.to(packed.dtype).contiguous()
        y = torch.ops.sgl_kernel.weight_packed_linear(values, packed, bias, True)
    return y.float()[:, :out_features].contiguous()


def _int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    scales = weight[0, -4 * rows :].view(torch.float32)
    packed = weight[0, : -4 * rows].view(torch.int8).view(rows, -1)
    steps, step_scales = torch.ops.sgl_kernel.per_token_quant_int8_cpu(x)
    assert steps.dtype == torch.uint8, "upstream gives steps plus 128"
    y: Tensor = torch.ops.sgl_kernel.int8_scaled_mm_cpu(
        steps, packed, step_scales, scales, bias, x.dtype, True
    )
    return y


def _float(fmt: Format) -> torch.dtype:
    return torch.bfloat16 if fmt == Format.BF16 else torch.float16


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
    """Caches are token-major in memory (``kv_cache.new_cache``), so that upstream's
    [tokens, kv_heads, D] is a view of them. Prompts go through the extend kernel where AMX is
    there, else token by token through the decode kernel: causality is in the lengths."""
    assert len(set(groups)) <= 1, "upstream divides query heads evenly"
    assert sinks is None, "models with sinks are not for it"
    keys, values = _token_major(k_cache, v_cache)
    live = slots >= 0
    rounded = [t[live].to(keys.dtype).contiguous() for t in (k, v)]
    torch.ops.sgl_kernel.store_cache_cpu(*rounded, keys, values, slots[live].long(), None)
    table = _slots_of(block_tables, k_cache.shape[3])
    # Upstream counts a window's tokens without the query's own; below zero it has none.
    options = (scale, softcap, False, window - 1, None, None)
    lengths = query_starts.diff()
    used = (context_lens > 0) & (lengths > 0)
    out = torch.zeros(q.shape)
    if has_amx and bool((lengths[used] > 1).any()):
        _extend(out, q, k, v, keys, values, table, query_starts, context_lens, used, options)
    else:
        _decode(out, q, keys, values, table, query_starts, context_lens, used, options)
    return out


Options = tuple[float, float, bool, int, None, None]


def _decode(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    contexts: Tensor,
    used: Tensor,
    options: Options,
) -> None:
    counts = starts.diff()[used].long()
    sequences = torch.arange(len(used))[used].repeat_interleave(counts)
    rows = torch.cat([torch.arange(*pair) for pair in _ranges(starts, used)] or [sequences])
    if len(rows) == 0:
        return
    ends = starts[1:].long()[sequences]
    lengths = contexts.long()[sequences] - (ends - 1 - rows)
    query = q[rows].to(keys.dtype).contiguous()
    result = torch.empty_like(query)
    scratch = torch.empty(len(rows), q.shape[1], _SPLITS, q.shape[2] + 1)
    unused = torch.zeros(len(rows), dtype=torch.int64)
    torch.ops.sgl_kernel.decode_attention_cpu(
        query,
        keys,
        values,
        result,
        None,
        None,
        unused,
        scratch,
        table,
        sequences,
        lengths,
        *options,
    )
    out[rows] = result.float()


def _extend(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    starts: Tensor,
    contexts: Tensor,
    used: Tensor,
    options: Options,
) -> None:
    rows = torch.cat([torch.arange(*pair) for pair in _ranges(starts, used)])
    lengths = starts.diff()[used]
    begins = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)[:-1])).to(table.dtype)
    query, key, value = (t[rows].to(keys.dtype).contiguous() for t in (q, k, v))
    result = torch.empty_like(query)
    torch.ops.sgl_kernel.extend_attention_cpu(
        query,
        key,
        value,
        result,
        keys,
        values,
        table,
        torch.arange(len(used))[used],
        contexts[used].long(),
        lengths.to(table.dtype),
        begins,
        int(lengths.max()),
        *options,
    )
    out[rows] = result.float()


def _ranges(starts: Tensor, used: Tensor) -> list[tuple[int, int]]:
    """Rows of each sequence that is there."""
    bounds, flags = starts.tolist(), used.tolist()
    return [(bounds[i], bounds[i + 1]) for i, flag in enumerate(flags) if flag]


def _token_major(k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views [blocks * block_size, kv_heads, D]. Raises RuntimeError for other strides."""
    blocks, heads, dim, size = k_cache.shape
    shape = (blocks * size, heads, dim)
    return k_cache.permute(0, 3, 1, 2).view(shape), v_cache.permute(0, 2, 1, 3).view(shape)


def _slots_of(block_tables: Tensor, size: int) -> Tensor:
    """int32 [S, width * size]: the slot of each of a sequence's tokens."""
    slots = block_tables[:, :, None] * size + torch.arange(size, dtype=torch.int32)
    return slots.flatten(1).contiguous()
