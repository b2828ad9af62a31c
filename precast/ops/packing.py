"""Packed weight formats of the native linears (``csrc/kernels.h`` has their layouts).

Packing happens once, at load, outside of any graph. The grouped formats quantise as llama.cpp does,
so that weights which came out of GGUF blocks of the same kind go back into the same blocks: nothing
is lost a second time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from precast.ops import native as native  # registers the operators
from precast.ops.gguf_blocks import FileWeight
from precast.ops.grids import affine_grid, inverse, symmetric_scale
from precast.ops.layout import GROUP, PANEL
from precast.ops.mixed import MixedPart, mixed_size, write_parts
from precast.ops.scaled import ScaledWeight, Weight, floats
from precast.system.process import pin

_CHUNK_VALUES: Final = 1 << 20
"""Weights that are packed at a time: bounds what packing takes beside its result."""


class Format(IntEnum):
    """Formats of a linear's weights; numbers as in ``csrc/kernels.h``."""

    FP32 = 0
    BF16 = 1
    FP16 = 2
    INT8 = 3
    """One scale for each output channel."""
    Q8_0 = 4
    """Groups of 32: 8 bits and a scale."""
    Q4_0 = 5
    """Groups of 32: 4 bits and a scale."""
    Q4_1 = 6
    """Groups of 32: 4 bits, a scale and a minimum."""
    MIXED = 15
    """Parts with formats of their own, such as a file's (``mixed.py``). Floats become Q8_0."""


_FLOATS: Final = {
    Format.FP32: torch.float32,
    Format.BF16: torch.bfloat16,
    Format.FP16: torch.float16,
}
_BITS: Final = {Format.Q8_0: 8, Format.Q4_0: 4, Format.Q4_1: 4}


def packed_size(n: int, k: int, fmt: Format) -> tuple[int, int]:
    """Panels and bytes of a panel: the shape of a packed [n, k] weight, uint8."""
    if fmt == Format.MIXED:
        return mixed_size([MixedPart(Format.Q8_0, n)], k)
    return -(-n // PANEL), int(torch.ops.precast.panel_bytes(int(fmt), k))


def packed_size_of(weight: Weight, fmt: Format) -> tuple[int, int]:
    """The shape of this weight, packed; uint8."""
    rows, columns = weight.shape
    if fmt == Format.MIXED and isinstance(weight, FileWeight):
        return mixed_size(weight.kinds(), columns)
    return packed_size(rows, columns, fmt)


def pack(weight: Weight, fmt: Format) -> Tensor:
    """[N, K] to uint8 ``packed_size_of``."""
    size = packed_size_of(weight, fmt)
    return pack_into(torch.empty(size, dtype=torch.uint8), weight, fmt)


def pack_into(out: Tensor, weight: Weight, fmt: Format) -> Tensor:
    """Like ``pack``, into memory of the caller's; ``weight`` is read a few rows at a time, on as
    many threads as compute. What comes quantised stays as it is where the format holds it. Raises
    ModelCorrupt for a file's scales that are not finite."""
    n, k = weight.shape
    if fmt == Format.MIXED:
        return _pack_mixed(out, weight)
    weight = floats(weight) if isinstance(weight, FileWeight) else weight
    cores = native.thread_cores()
    each = -(-n // len(cores) // PANEL) * PANEL
    rows = max(PANEL, min(each, _CHUNK_VALUES // max(1, k) // PANEL * PANEL))

    def some(start: int) -> None:
        part = weight[start : start + rows]
        begin = start // PANEL
        panels = out[begin : begin + -(-part.shape[0] // PANEL)]
        packed = _pack_rows(_pad_rows(part), fmt)
        panels[:, : packed.shape[1]] = packed
        panels[:, packed.shape[1] :] = 0

    _on_threads(some, range(0, n, rows), cores)
    return out


def _pack_mixed(out: Tensor, weight: Weight) -> Tensor:
    columns = weight.shape[1]
    if isinstance(weight, FileWeight):
        weight.pack_into(write_parts(out, weight.kinds(), columns))
    else:
        [panels] = write_parts(out, [MixedPart(Format.Q8_0, weight.shape[0])], columns)
        pack_into(panels, weight, Format.Q8_0)
    return out


def _on_threads(work: Callable[[int], None], items: Sequence[int], cores: Sequence[int]) -> None:
    """Calls ``work`` for each item. torch lets other threads run while it computes."""
    inference = torch.is_inference_mode_enabled()  # which is a thread's own

    def in_thread(item: int) -> None:
        with torch.inference_mode(inference):
            work(item)

    if len(items) == 1 or len(cores) == 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(len(cores), initializer=_spread, initargs=(cores,)) as threads:
        for _ in threads.map(in_thread, items):
            pass


def _spread(cores: Sequence[int]) -> None:
    """A new thread has only its maker's core, if that is pinned."""
    if min(cores) >= 0:
        pin(cores)


def _pack_rows(weight: Weight, fmt: Format) -> Tensor:
    """[panels * 16, K] to uint8 [panels, bytes]."""
    panels = weight.shape[0] // PANEL
    if fmt in _FLOATS:
        values = floats(weight).to(_FLOATS[fmt]).view(panels, PANEL, -1)
        return values.transpose(1, 2).reshape(panels, -1).view(torch.uint8)
    if fmt == Format.INT8:
        quantized, scales = _own_channels(weight) or quantize_int8(floats(weight))
        quantized = torch.nn.functional.pad(quantized, (0, -quantized.shape[1] % 4))
        steps = quantized.view(panels, PANEL, -1, 4).transpose(1, 2).reshape(panels, -1)
        return torch.cat((steps.view(torch.uint8), scales.view(panels, -1).view(torch.uint8)), 1)
    return _pack_grouped(weight, fmt)


def _pack_grouped(weight: Weight, fmt: Format) -> Tensor:
    quantized, scales = _own_groups(weight, fmt) or quantize_groups(floats(weight), fmt)
    panels = weight.shape[0] // PANEL
    blocks = quantized.shape[1] // 2
    if fmt == Format.Q8_0:
        steps = quantized.view(panels, PANEL, blocks, 2, 8, 4).permute(0, 2, 3, 4, 1, 5)
        values = steps.reshape(panels, blocks, -1).view(torch.uint8)
    else:
        low, high = quantized.view(panels, PANEL, blocks, 2, 2, 4, 4).unbind(4)
        both = low | (high << 4)
        values = both.permute(0, 2, 3, 4, 1, 5).reshape(panels, blocks, -1)
    rows = [
        scale.view(panels, PANEL, blocks, 2).permute(0, 2, 3, 1).reshape(panels, blocks, -1)
        for scale in scales
    ]
    return torch.cat([values, *(row.view(torch.uint8) for row in rows)], dim=2).view(panels, -1)


def _own_channels(weight: Weight) -> tuple[Tensor, Tensor] | None:
    """What ``quantize_int8`` gives, of a weight that comes so."""
    if not isinstance(weight, ScaledWeight) or weight.minima is not None or not weight.bits:
        return None
    one_scale = weight.group is None or weight.scales.shape[1] == 1
    return (weight.values, weight.scales[:, 0].contiguous()) if one_scale else None


def _own_groups(weight: Weight, fmt: Format) -> tuple[Tensor, list[Tensor]] | None:
    """What ``quantize_groups`` gives, of a weight that comes so. Scales are rounded to fp16, which
    is what most checkpoints have; minima too, by 2^-11 of them."""
    if not isinstance(weight, ScaledWeight) or not weight.has_groups(_BITS[fmt]):
        return None
    if weight.minima is not None and fmt != Format.Q4_1:
        return None
    values, scales, minima = weight.by_group()
    if fmt == Format.Q8_0:
        return values, [scales.half()]
    if minima is None:  # signed
        values, minima = values + 8, -8 * scales
    parameters = [scales, minima] if fmt == Format.Q4_1 else [scales]
    return values.to(torch.uint8), [parameter.half() for parameter in parameters]


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Float [N, K] to int8 [N, K] in [-127, 127] and float32 scales [N], symmetric per channel."""
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127.0
    quantized = torch.round(weight * inverse(scales)[:, None]).clamp_(-127, 127)
    return quantized.to(torch.int8), scales


def quantize_groups(weight: Tensor, fmt: Format) -> tuple[Tensor, list[Tensor]]:
    """Float [N, K] to quantised [N, G, 32] and per-group fp16 parameters [N, G] each.

    int8 and the scale for Q8_0; uint8 in [0, 15] and the scale for Q4_0 (w = scale * (q - 8));
    uint8, scale and minimum for Q4_1 (w = scale * q + minimum). G is even; inputs past K repeat the
    last one.
    """
    weight = weight.float()
    extra = -weight.shape[1] % (2 * GROUP)
    if extra:
        weight = torch.cat((weight, weight[:, -1:].expand(-1, extra)), dim=1)
    groups = weight.view(weight.shape[0], -1, GROUP)
    if fmt == Format.Q8_0:
        scale = groups.abs().amax(dim=2) / 127.0
        quantized = torch.round(groups * inverse(scale)[..., None]).clamp_(-127, 127)
        return quantized.to(torch.int8), [scale.half()]
    if fmt == Format.Q4_0:
        scale = symmetric_scale(groups)
        quantized = torch.floor(groups * inverse(scale)[..., None] + 8.5).clamp_(0, 15)
        return quantized.to(torch.uint8), [scale.half()]
    scale, low = affine_grid(groups)
    shifted = (groups - low[..., None]) * inverse(scale)[..., None]
    return torch.floor(shifted + 0.5).clamp_(0, 15).to(torch.uint8), [scale.half(), low.half()]


def unpack(packed: Tensor, n: int, k: int, fmt: Format) -> Tensor:
    """The float32 [N, K] weights that a packed tensor stands for."""
    if fmt == Format.MIXED:
        found: Tensor = torch.ops.precast.unpack(torch.arange(n), packed, k, int(fmt))
        return found
    panels = packed.shape[0]
    if fmt in _FLOATS:
        values = packed.view(_FLOATS[fmt])[:, : k * PANEL].view(panels, k, PANEL)
        return values.transpose(1, 2).reshape(-1, k)[:n].float()
    if fmt == Format.INT8:
        size = -(-k // 4) * 4 * PANEL
        steps = packed[:, :size].view(torch.int8).view(panels, -1, PANEL, 4).transpose(1, 2)
        scales = packed[:, size : size + PANEL * 4].contiguous().view(torch.float32).view(-1, 1)
        return (steps.reshape(panels * PANEL, -1).float() * scales)[:n, :k]
    return _unpack_grouped(packed, n, k, fmt)


def _unpack_grouped(packed: Tensor, n: int, k: int, fmt: Format) -> Tensor:
    panels = packed.shape[0]
    blocks = -(-k // (2 * GROUP))
    packed = packed.view(panels, blocks, -1)
    size = 2 * GROUP * PANEL // (1 if fmt == Format.Q8_0 else 2)
    if fmt == Format.Q8_0:
        steps = (
            packed[..., :size].contiguous().view(torch.int8).view(panels, blocks, 2, 8, PANEL, 4)
        )
    else:
        both = packed[..., :size].contiguous().view(panels, blocks, 2, 4, PANEL, 4)
        steps = torch.cat((both & 15, both >> 4), dim=3)
    values = steps.permute(0, 4, 1, 2, 3, 5).reshape(panels * PANEL, blocks * 2, GROUP).float()
    rows = packed[..., size:].contiguous().view(torch.float16).view(panels, blocks, -1, 2, PANEL)
    parameters = rows.permute(2, 0, 4, 1, 3).reshape(rows.shape[2], panels * PANEL, blocks * 2, 1)
    scale = parameters[0].float()
    if fmt == Format.Q4_1:
        result = values * scale + parameters[1].float()
    else:
        result = (values - (8 if fmt == Format.Q4_0 else 0)) * scale
    return result.view(panels * PANEL, -1)[:n, :k]


def _pad_rows(weight: Weight) -> Weight:
    missing = -weight.shape[0] % PANEL
    if isinstance(weight, ScaledWeight):
        return weight.padded(missing) if missing else weight
    return torch.nn.functional.pad(floats(weight), (0, 0, 0, missing))
