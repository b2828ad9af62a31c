"""Packed weight formats of the native linears (``csrc/kernels.h``).

Packing happens once, at load, outside of any graph.
"""

import torch
from torch import Tensor

PANEL = 16
"""Output columns that are interleaved."""


def _pad(weight: Tensor, rows: int, columns: int) -> Tensor:
    n, k = weight.shape
    extra = ((-n) % rows, (-k) % columns)
    return torch.nn.functional.pad(weight, (0, extra[1], 0, extra[0]))


def pack_float(weight: Tensor) -> Tensor:
    """float32 or bfloat16 [N, K] to [ceil(N / 16), K, 16]; rows past N are zero."""
    padded = _pad(weight, PANEL, 1)
    n, k = padded.shape
    return padded.view(n // PANEL, PANEL, k).transpose(1, 2).contiguous()


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] to int8 [N, K] in [-127, 127] and float32 scales [N], symmetric per channel."""
    scales = weight.abs().amax(dim=1).float() / 127.0
    safe = torch.where(scales > 0, scales, torch.ones_like(scales))
    quantized = torch.round(weight.float() / safe[:, None]).clamp_(-127, 127).to(torch.int8)
    return quantized, scales


def pack_int8(weight: Tensor) -> list[Tensor]:
    """float [N, K] to the tensors of ``linear_w8a8``: packed int8 [ceil(N / 16), ceil(K / 4), 16,
    4], scales float32 [N], column sums int32 [ceil(N / 16) * 16]."""
    quantized, scales = quantize_int8(weight)
    padded = _pad(quantized, PANEL, 4)
    n, k = padded.shape
    packed = padded.view(n // PANEL, PANEL, k // 4, 4).transpose(1, 2).contiguous()
    sums = padded.sum(dim=1, dtype=torch.int32)
    return [packed, scales, sums]
