"""Every operator in plain torch: what the kernels must agree with."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from precast.ops.layout import GROUP, PANEL
from precast.ops.packing import Format, unpack
from precast.ops.providers.base import OPERATORS, Choice, Kernel, Selection

NAME: Final = "reference"
_SCALE_BYTES: Final = 4


def select() -> Selection:
    kernels: dict[str, Kernel] = {
        "embedding": embedding,
        "fused_experts": fused_experts,
        "gelu_tanh_and_mul": gelu_tanh_and_mul,
        "linear": linear,
        "paged_attention": paged_attention,
        "rms_norm": rms_norm,
        "rotary": rotary,
        "route": route,
        "sigmoid_and_mul": sigmoid_and_mul,
        "silu_and_mul": silu_and_mul,
        "soft_cap": soft_cap,
    }
    choices = {name: Choice(provider=NAME) for name in OPERATORS}
    return Selection(wanted=NAME, choices=choices, kernels=kernels)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, D], pairs (i, i + R / 2) of the first R features as Hugging
    Face lays them out; R is twice the width of ``cos`` and ``sin`` [T, R / 2]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate="tanh") * up


def sigmoid_and_mul(gate: Tensor, x: Tensor) -> Tensor:
    return torch.sigmoid(gate) * x


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Values squeezed into (-cap, cap)."""
    return torch.tanh(x / cap) * cap


def route(scores: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Scores [T, experts] to each token's likeliest experts [T, per_token] and their
    probabilities; ``normalize``: those sum to one."""
    weights, chosen = scores.softmax(-1).topk(per_token, dim=-1)
    return chosen, weights / weights.sum(-1, keepdim=True) if normalize else weights


def embedding(ids: Tensor, weight: Tensor, features: int, format: int) -> Tensor:
    if format == Format.MIXED:  # whose parts only our own code reads
        found: Tensor = torch.ops.precast.unpack(ids, weight, features, format)
        return found
    rows = weight.shape[0] * PANEL
    return unpack(weight, rows, features, Format(format))[ids]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, format: int
) -> Tensor:
    fmt = Format(format)
    if fmt >= Format.INT8:
        x = _rounded(x, GROUP)
    return torch.nn.functional.linear(x, unpack(weight, out_features, x.shape[1], fmt), bias)


def fused_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_size: int,
    format: int,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 0.0,
) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        rows, choices = torch.where(experts == expert)
        bias, out_bias = (b if b is None else b[expert] for b in (gate_up_bias, down_bias))
        both = linear(x[rows], gate_up[expert], bias, 2 * expert_size, format)
        inner = _clamped(both, limit) if limit else silu_and_mul(both)
        y = linear(inner, down[expert], out_bias, x.shape[1], format)
        out.index_add_(0, rows, y * weights[rows, choices, None])
    return out


def _clamped(gate_up: Tensor, limit: float) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-limit, limit) + 1)


def _rounded(x: Tensor, group: int) -> Tensor:
    """x [M, K] as 8-bit steps of the largest value in each group of K would have it."""
    rows, k = x.shape
    groups = torch.nn.functional.pad(x, (0, -k % group)).view(rows, -(-k // group), group)
    scale = groups.abs().amax(dim=2, keepdim=True) / 127
    steps = torch.where(scale > 0, groups / scale, torch.zeros_like(groups)).round()
    return (steps * scale).flatten(1)[:, :k]


def paged_attention(
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
    sizes = torch.tensor(groups or [q.shape[1] // k.shape[1]] * k.shape[1])
    live = slots >= 0
    if live.any():
        _store(k_cache, v_cache, k[live], v[live], slots[live].long())
    out = torch.zeros(q.shape)
    starts = query_starts.tolist()
    for index, context in enumerate(context_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        if context and rows.start < rows.stop:
            keys, values = _load(k_cache, v_cache, block_tables[index].long(), q.shape[2], context)
            keys, values = (t.repeat_interleave(sizes, dim=1) for t in (keys, values))
            out[rows] = _attend(q[rows], keys, values, scale, window, softcap, sinks)
    return out


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """The last tokens of a sequence, q [T, heads, D], and its keys and values [C, heads, D]."""
    scores = torch.einsum("thd,chd->htc", q, keys) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    context = keys.shape[0]
    seen = torch.arange(context)[None] - torch.arange(context - q.shape[0], context)[:, None]
    hidden = (seen > 0) | (seen <= -window) if window else seen > 0
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks[:, None, None].expand(-1, scores.shape[1], 1)
        shares = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
        return torch.einsum("htc,chd->thd", shares, values)
    return torch.einsum("htc,chd->thd", scores.softmax(-1), values)


def _store(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    size = k_cache.shape[3]
    blocks, at = slots // size, slots % size
    dim = k.shape[2]
    if k_cache.dtype != torch.int8:
        k_cache[blocks, :, :, at] = k.to(k_cache.dtype)
        v_cache[blocks, :, at] = v.to(v_cache.dtype)
        return
    (k_steps, k_scales), (v_steps, v_scales) = _quantized(k), _quantized(v)
    k_cache[blocks, :, :dim, at] = k_steps
    v_cache[blocks, :, at] = torch.cat((v_steps, v_scales), dim=2)
    for byte in range(_SCALE_BYTES):  # the scales of a block's keys lie one behind the other
        place = at * _SCALE_BYTES + byte
        k_cache[blocks, :, dim + place // size, place % size] = k_scales[..., byte]


def _quantized(x: Tensor) -> tuple[Tensor, Tensor]:
    """[T, heads, D] to int8 steps and the bytes of their float32 scale [T, heads, 4]."""
    scale = x.abs().amax(dim=2, keepdim=True) / 127
    steps = torch.where(scale > 0, x / scale, torch.zeros_like(x)).round()
    return steps.to(torch.int8), scale.contiguous().view(torch.int8)


def _load(
    k_cache: Tensor, v_cache: Tensor, table: Tensor, dim: int, context: int
) -> tuple[Tensor, Tensor]:
    """A sequence's keys and values as float32 [context, heads, D]."""
    k, v = k_cache[table], v_cache[table]
    keys, values = k[:, :, :dim].float(), v[..., :dim].float()
    if k_cache.dtype == torch.int8:
        k_scales = k[:, :, dim:].contiguous().flatten(2).view(torch.float32)
        keys = keys * k_scales[:, :, None]
        values = values * v[..., dim:].contiguous().view(torch.float32)
    keys, values = keys.permute(0, 3, 1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
    return keys[:context], values[:context]
