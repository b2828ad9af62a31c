"""Our operators in terms of upstream's: layouts, types and mutation.

Hidden states are float32 between our operators; upstream's take and give ``dtype`` (bfloat16 or
float16), but for a linear's bias, which is float32. Everything is checked or made right here.
"""

from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pad as zero_pad

from precast.ops.packing import Format, quantize_int8

LAYOUT: Final = "2"
"""Changes with what ``pack`` makes, so that weights which were packed before are packed again."""
_COLUMNS: Final = 32
_ROWS: Final = {Format.BF16: 16, Format.FP16: 16, Format.INT8: 32}
"""Upstream's packed weights come in tiles of these sizes."""


def rms_norm(dtype: torch.dtype, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.to(dtype).reshape(-1, x.shape[-1]).contiguous()
    out: Tensor = torch.ops.sgl_kernel.rmsnorm_cpu(rows, weight.to(dtype).contiguous(), eps)
    return out.float().view(x.shape)


def silu_and_mul(dtype: torch.dtype, gate_up: Tensor) -> Tensor:
    out: Tensor = torch.ops.sgl_kernel.silu_and_mul_cpu(gate_up.to(dtype).contiguous())
    return out.float()


def gelu_tanh_and_mul(dtype: torch.dtype, gate_up: Tensor) -> Tensor:
    out: Tensor = torch.ops.sgl_kernel.gelu_tanh_and_mul_cpu(gate_up.to(dtype).contiguous())
    return out.float()


def rotary(dtype: torch.dtype, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, D]. Upstream rotates queries and keys in one call, in place where they are 2-D,
    and looks positions up: here the table has one row a token, and the key has no heads."""
    tokens, heads, dim = x.shape
    # A copy, which upstream overwrites and returns as an alias that its schema doesn't declare.
    query = x.to(dtype, copy=True).reshape(tokens, heads * dim).contiguous()
    key = torch.empty(tokens, 0, dtype=dtype)
    table = torch.cat((cos, sin), dim=1).to(dtype)
    positions = torch.arange(tokens)
    torch.ops.sgl_kernel.rotary_embedding_cpu(positions, query, key, dim, table, True)
    return query.float().view(tokens, heads, dim)


def pack(weight: Tensor, fmt: Format) -> Tensor:
    """Float [N, K] to uint8 [1, bytes]: upstream's packed weight, then int8's scales."""
    n, k = weight.shape
    padded = zero_pad(weight, (0, -k % _COLUMNS, 0, -n % _ROWS[fmt]))
    convert = torch.ops.sgl_kernel.convert_weight_packed
    if fmt == Format.INT8:
        quantized, scales = quantize_int8(padded)
        parts = [convert(quantized.contiguous()), scales]
    else:
        parts = [convert(padded.to(float_type(fmt)).contiguous())]
    return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])[None]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_features: int,
    format: int,
) -> Tensor:
    if len(x) == 0:  # which upstream divides by
        return x.new_empty(0, out_features)
    fmt = Format(format)
    rows = -(-out_features // _ROWS[fmt]) * _ROWS[fmt]
    x = _padded(x.to(float_type(fmt)), -x.shape[1] % _COLUMNS).contiguous()
    if bias is not None:
        bias = _padded(bias.float(), rows - out_features).contiguous()
    if fmt == Format.INT8:
        y = _int8_linear(x, weight, bias, rows)
    else:
        packed = weight.view(x.dtype).view(rows, x.shape[1])
        y = torch.ops.sgl_kernel.weight_packed_linear(x, packed, bias, True)
    return (y if rows == out_features else y[:, :out_features]).float().contiguous()


def _int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    """Activations are rounded to 8 bits a token; results are bfloat16, all that upstream has."""
    scales = weight[0, -4 * rows :].view(torch.float32)
    packed = weight[0, : -4 * rows].view(torch.int8).view(rows, -1)
    y: Tensor = torch.ops.sgl_kernel.int8_scaled_mm_with_quant(
        x, packed, scales, bias, x.dtype, True
    )
    return y


def _padded(x: Tensor, count: int) -> Tensor:
    """With ``count`` zeros behind the last dimension; no copy for none."""
    return zero_pad(x, (0, count)) if count else x


def float_type(fmt: Format) -> torch.dtype:
    """Of what upstream takes and gives for weights of a format; int8 has results in bfloat16."""
    return torch.float16 if fmt == Format.FP16 else torch.bfloat16
