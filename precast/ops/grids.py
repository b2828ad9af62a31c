"""The grid that weights already lie on, if they came out of 4-bit blocks.

GGUF files are dequantised at import. Rounded to nearest, a block holds both ends of its range, and
the ends tell the scale. Blocks whose scale was searched for (with an importance matrix, or in a
K-quant) need not, and a scale from their ends would round them a second time, to another grid. So
groups that don't fit their ends are tried with fewer steps between them.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

_TOLERANCE: Final = 0.05
"""Distance from a grid, in steps, of weights that lie on it: those that went through bfloat16 are
off by up to 2^-9 of their size. Of 32 other weights all are as close with a chance of 1e-31."""
_SAMPLE: Final = 256
"""Groups that tell whether a weight's others are worth trying: most weights lie on no grid."""

Grid = tuple[Tensor, Tensor]
"""Scale and minimum of each group [G]; weights are whole multiples of the one above the other."""


def symmetric_scale(groups: Tensor) -> Tensor:
    """Q4_0's scale of each group, [N, G] of [N, G, 32]: weights are -8 to 7 of it."""
    flat = groups.flatten(0, 1)
    largest = flat.gather(1, flat.abs().argmax(dim=1, keepdim=True)).squeeze(1)

    def grid(chosen: Tensor, steps: int) -> Grid:
        return largest[chosen] / steps, torch.zeros_like(largest[chosen])

    scale, _ = _best(flat, grid, [-8, *range(7, 0, -1)], (-8, 7))
    return scale.view(groups.shape[:2])


def affine_grid(groups: Tensor) -> Grid:
    """Q4_1's scale and minimum of each group, [N, G] of [N, G, 32]: weights are 0 to 15 of the one
    above the other."""
    flat = groups.flatten(0, 1)
    low, high = flat.aminmax(dim=1)

    def grid(chosen: Tensor, steps: int) -> Grid:
        scale, lowest = (high - low)[chosen] / steps, low[chosen]
        # A block's lowest weight need not have its minimum: of those that leave all weights within
        # 15 steps, the one that half precision holds best.
        minimum = lowest
        for below in range(1, 16 - steps):
            other = lowest - below * scale
            minimum = torch.where(_halving_error(other) < _halving_error(minimum), other, minimum)
        return scale, minimum

    scale, minimum = _best(flat, grid, list(range(15, 0, -1)), (0, 15))
    return scale.view(groups.shape[:2]), minimum.view(groups.shape[:2])


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale != 0, 1.0 / scale, torch.zeros_like(scale))


def _best(
    groups: Tensor,
    grid: Callable[[Tensor, int], Grid],
    steps: list[int],
    ends: tuple[int, int],
) -> Grid:
    """For each group the grid that it lies on and that half precision holds best; that of the first
    of ``steps`` where it lies on none. ``grid``: those of chosen groups, with so many steps from
    end to end."""
    scale, minimum = grid(torch.arange(groups.shape[0]), steps[0])
    error = _grid_error(groups, scale, minimum, ends)
    open_ = (error > 0).nonzero().squeeze(1)
    sample = open_[:: max(1, open_.numel() // _SAMPLE)]
    if not any(
        _grid_error(groups[sample], *grid(sample, count), ends).isfinite().any() for count in steps
    ):
        return scale, minimum
    for count in steps[1:]:
        scales, minima = grid(open_, count)
        errors = _grid_error(groups[open_], scales, minima, ends)
        better = errors < error[open_]
        chosen = open_[better]
        scale[chosen], minimum[chosen], error[chosen] = (
            scales[better],
            minima[better],
            errors[better],
        )
    return scale, minimum


def _grid_error(groups: Tensor, scale: Tensor, minimum: Tensor, ends: tuple[int, int]) -> Tensor:
    """What half precision makes of each group's grid, at the most; infinite where the group does
    not lie on it."""
    steps = (groups - minimum[:, None]) * inverse(scale)[:, None]
    whole = steps.round()
    fits = (steps - whole).abs_().amax(dim=1) <= _TOLERANCE
    fits &= (whole.amin(dim=1) >= ends[0]) & (whole.amax(dim=1) <= ends[1])
    error = whole.abs_().amax(dim=1) * _halving_error(scale) + _halving_error(minimum)
    return torch.where(fits, error, torch.inf)


def _halving_error(x: Tensor) -> Tensor:
    return (x - x.half().float()).abs()
