"""Weights that say themselves what they are: parts of formats of their own, one below the other.

A GGUF file mixes formats from layer to layer, and within a linear that is fused out of several.
With the formats in the weight (``csrc/mixed.h``), a graph is captured once for all of them.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

from precast.ops import native as native  # registers the operators
from precast.ops.layout import PANEL

_MAGIC: Final = 0x646578696D2E6370
HEADER: Final = 192
MAX_PARTS: Final = 7
_LINE: Final = 64


class MixedPart(NamedTuple):
    format: int
    """As in ``csrc/kernels.h``."""
    rows: int


def mixed_size(parts: Sequence[MixedPart], k: int) -> tuple[int, int]:
    """The shape of a weight of these parts and ``k`` columns, uint8."""
    return 1, HEADER + sum(_bytes_of(part, k) for part in parts)


def write_parts(out: Tensor, parts: Sequence[MixedPart], k: int) -> list[Tensor]:
    """Writes the header of a weight of ``mixed_size``; returns where each part's panels go, uint8
    [panels, bytes]."""
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"a weight has 1 to {MAX_PARTS} parts, not {len(parts)}")
    flat = out.view(-1)
    sizes = [_bytes_of(part, k) for part in parts]
    starts = list(accumulate(sizes, initial=HEADER))
    words = [_MAGIC, k, len(parts)]
    for part, start in zip(parts, starts, strict=False):
        words += [part.format, part.rows, start]
    words += [0] * (HEADER // 8 - len(words))
    flat[:HEADER] = torch.tensor(words, dtype=torch.int64).view(torch.uint8)
    return [
        flat[start : start + size].view(_panels(part), size // max(1, _panels(part)))
        for part, start, size in zip(parts, starts, sizes, strict=False)
    ]


def _bytes_of(part: MixedPart, k: int) -> int:
    size = int(torch.ops.precast.panel_bytes(part.format, k))
    assert size % _LINE == 0
    return _panels(part) * size


def _panels(part: MixedPart) -> int:
    return -(-part.rows // PANEL)
