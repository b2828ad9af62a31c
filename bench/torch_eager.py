"""The operators of a step as torch itself would serve them, to compare with.

Definitions are those of the provider ``reference``; linears are torch's own of each format, with
weights that are packed once as they want them: mkldnn's float32, bfloat16, fbgemm's int8, and
``_weight_int4pack_mm_for_cpu`` for four bits. ``q8_0`` has none, int8's is used.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from precast.ops.layout import GROUP, PANEL
from precast.ops.packing import Format, unpack
from precast.ops.providers import Selection, reference

Linear = Callable[[Tensor], Tensor]
_INT4: Final = (Format.Q4_0, Format.Q4_1)
_INT8: Final = (Format.INT8, Format.Q8_0)


class TorchOperators:
    """Linears and tables are made at their first call: call each step once before it is timed."""

    def __init__(self) -> None:
        self._linears: dict[int, Linear] = {}
        self._tables: dict[int, Tensor] = {}

    def selection(self) -> Selection:
        known = reference.select()
        kernels: dict[str, Callable[..., Tensor]] = dict(known.kernels)
        kernels |= {"linear": self._linear, "embedding": self._embedding}
        return replace(known, kernels=kernels)

    def _linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, format: int
    ) -> Tensor:
        linear = self._linears.get(weight.data_ptr())
        if linear is None:
            fmt = Format(format)
            linear = torch_linear(unpack(weight, out_features, x.shape[1], fmt), fmt)
            self._linears[weight.data_ptr()] = linear
        y = linear(x)
        return y if bias is None else y + bias

    def _embedding(self, ids: Tensor, weight: Tensor, features: int, format: int) -> Tensor:
        table = self._tables.get(weight.data_ptr())
        if table is None:
            table = unpack(weight, weight.shape[0] * PANEL, features, Format(format))
            self._tables[weight.data_ptr()] = table
        return table[ids]


def torch_linear(weight: Tensor, fmt: Format) -> Linear:
    """torch's linear over float [N, K], quantised again where it wants another form."""
    if fmt in (Format.BF16, Format.FP16):
        half = weight.to(torch.bfloat16)
        return lambda x: functional.linear(x.to(torch.bfloat16), half).float()
    if fmt in _INT8:
        return _int8(weight)
    return _int4(weight) if fmt in _INT4 else lambda x: functional.linear(x, weight)


def _int8(weight: Tensor) -> Linear:
    scales = weight.abs().amax(1).clamp_min(1e-8) / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, but torch's fastest
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def _int4(weight: Tensor) -> Linear:
    groups = weight.view(len(weight), -1, GROUP)
    scales = groups.abs().amax(2).clamp_min(1e-8) / 7
    steps = (groups / scales[..., None]).round().clamp(-8, 7).to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps.flatten(1), 1)
    both = torch.stack((scales, torch.zeros_like(scales)), 2).transpose(0, 1)
    params = both.to(torch.bfloat16).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x.to(torch.bfloat16), packed, GROUP, params).float()
