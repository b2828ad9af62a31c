"""Our mixtures of experts in terms of upstream's.

Upstream packs each expert as it packs a linear, one behind the other. Its products come in blocks
of 32 rows and columns, gate's and up's each by themselves; biases it adds in some cases only, so
experts with biases are none of its.
"""

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from precast.ops.packing import Format, quantize_int8
from precast.ops.providers.sgl_adapters import float_type

ROUTED: Final = frozenset({1, 2, 4, 8, 16, 32, 64, 128, 160, 256, 384, 512})
"""Numbers of experts that its router is compiled for."""
_BLOCK: Final = 32
_SUM_BYTES: Final = 4
"""Behind each row of packed int8 weights: its sum."""
_PLAIN, _INT8 = 0, 1
"""How weights are stored, in its numbers."""


def route(scores: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """Scores stay float32; among equals, which are the likeliest is left open."""
    rows = scores.contiguous()
    weights, chosen = torch.ops.sgl_kernel.topk_softmax_cpu(rows, rows, per_token, normalize)
    return chosen.long(), weights


def pack(weights: Iterable[Tensor], parts: int, fmt: Format) -> Tensor:
    """Float [N, K] of each expert, ``parts`` linears one below the other, to uint8
    [experts, 1, bytes]: the packed weights of all, then for int8 the scales of all."""
    packed, scales = [], []
    for weight in weights:
        padded = _padded(weight, parts)
        if fmt == Format.INT8:
            padded, own = quantize_int8(padded)
            scales.append(own.contiguous())
        else:
            padded = padded.to(float_type(fmt))
        packed.append(torch.ops.sgl_kernel.convert_weight_packed(padded.contiguous()))
    pieces = [piece.view(-1).view(torch.uint8) for piece in (*packed, *scales)]
    return torch.cat(pieces).view(len(packed), 1, -1)


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
    assert gate_up_bias is None, "its experts have no biases"
    assert down_bias is None, "its experts have no biases"
    assert not limit, "its experts have no limit"
    if len(x) == 0:
        return torch.empty_like(x)
    fmt = Format(format)
    hidden, inner = _blocks(x.shape[1]), _blocks(expert_size)
    rows = zero_pad(x.to(float_type(fmt)), (0, hidden - x.shape[1])).contiguous()
    first, first_scales = _unpacked(gate_up, fmt, 2 * inner, hidden)
    second, second_scales = _unpacked(down, fmt, hidden, inner)
    y: Tensor = torch.ops.sgl_kernel.fused_experts_cpu(
        rows,
        first,
        second,
        weights.contiguous(),
        experts.int(),
        False,
        _INT8 if fmt == Format.INT8 else _PLAIN,
        first_scales,
        second_scales,
        *(None,) * 7,  # zero points, blocks of scales, biases, a limit
        True,
    )
    return y[:, : x.shape[1]].float().contiguous()


def _unpacked(packed: Tensor, fmt: Format, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    """Views of what ``pack`` made: weights as upstream packed them, and int8's scales."""
    count, whole = len(packed), packed.view(-1)
    if fmt != Format.INT8:
        return whole.view(float_type(fmt)).view(count, n, k), None
    row = k + _SUM_BYTES
    split = count * n * row
    return whole[:split].view(torch.int8).view(count, n, row), whole[split:].view(torch.float32)


def _padded(weight: Tensor, parts: int) -> Tensor:
    """Each part [N / parts, K] with zeros to whole blocks."""
    rows, columns = weight.shape[0] // parts, weight.shape[1]
    each = weight.view(parts, rows, columns)
    filled = (0, _blocks(columns) - columns, 0, _blocks(rows) - rows)
    return zero_pad(each, filled).flatten(0, 1)


def _blocks(size: int) -> int:
    """``size`` rounded up to whole blocks."""
    return -(-size // _BLOCK) * _BLOCK
