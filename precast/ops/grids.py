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
"""Distance from a grid, in steps, of weights that lie on it: for those that went through bfloat16,
which are off by 2^-9 of their size, if they are at most 25 steps from zero."""
_SAMPLE: Final = 256
"""Groups that tell whether others are worth trying: most weights lie on no grid."""
_WORTH: Final = 1 / 16
"""The share of them that has to lie on one."""

Grid = tuple[Tensor, Tensor]
"""Scale and minimum of each group [G]; weights are whole multiples of the one above the other."""


def symmetric_scale(groups: Tensor) -> Tensor:
    """Q4_0's scale of each group, [N, G] of [N, G, 32]: weights are -8 to 7 of it."""
    flat = groups.flatten(0, 1)
    largest = flat.gather(1, flat.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    zeros = torch.zeros_like(largest)
    scale, _ = _best(flat, zeros, largest, [-8, *range(7, 0, -1)], (-8, 7), lambda *at: at[0])
    return scale.view(groups.shape[:2])


def affine_grid(groups: Tensor) -> Grid:
    """Q4_1's scale and minimum of each group, [N, G] of [N, G, 32]: weights are 0 to 15 of the one
    above the other."""
    flat = groups.flatten(0, 1)
    low, high = flat.aminmax(dim=1)
    steps = list(range(15, 0, -1))
    scale, minimum = _best(flat, low, high - low, steps, (0, 15), _best_held)
    return scale.view(groups.shape[:2]), minimum.view(groups.shape[:2])


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale != 0, 1.0 / scale, torch.zeros_like(scale))


def _best(
    groups: Tensor,
    start: Tensor,
    extent: Tensor,
    steps: list[int],
    ends: tuple[int, int],
    minimum_of: Callable[[Tensor, Tensor, int], Tensor],
) -> Grid:
    """For each group the grid with the first of ``steps`` over its extent, or with another one that
    it lies on and that leaves less error. ``minimum_of``: start, scale and steps to minimum."""
    scale, minimum = extent / steps[0], start.clone()
    error = _error(groups, scale, minimum, ends)
    # Not at equal distances, which would be those of the weight's rows.
    open_ = (error > 0).nonzero().squeeze(1)
    order = torch.randperm(open_.numel(), generator=torch.Generator().manual_seed(0))
    sample = open_[order[:_SAMPLE]]
    fits = [
        _on_grid(groups[sample], start[sample], extent[sample] / count, ends) for count in steps
    ]
    if sample.numel() == 0 or torch.stack(fits).any(dim=0).float().mean() < _WORTH:
        return scale, minimum
    for count in steps:
        tried = open_[_on_grid(groups[open_], start[open_], extent[open_] / count, ends)]
        scales = extent[tried] / count
        minima = minimum_of(start[tried], scales, count)
        errors = _error(groups[tried], scales, minima, ends)
        better = errors < error[tried]
        chosen = tried[better]
        scale[chosen], minimum[chosen] = scales[better], minima[better]
        error[chosen] = errors[better]
    return scale, minimum


def _best_held(low: Tensor, scale: Tensor, steps: int) -> Tensor:
    """Of the minima that leave all weights within 15 steps the one that half precision holds best:
    that is a block's own, which its lowest weight need not have."""
    minimum = low
    for below in range(1, 16 - steps):
        other = low - below * scale
        minimum = torch.where(_halving_error(other) < _halving_error(minimum), other, minimum)
    return minimum


def _on_grid(groups: Tensor, start: Tensor, scale: Tensor, ends: tuple[int, int]) -> Tensor:
    steps = (groups - start[:, None]) * inverse(scale)[:, None]
    whole = steps.round()
    inside = (whole.amin(dim=1) >= ends[0]) & (whole.amax(dim=1) <= ends[1])
    return inside & ((steps - whole).abs_().amax(dim=1) <= _TOLERANCE)


def _error(groups: Tensor, scale: Tensor, minimum: Tensor, ends: tuple[int, int]) -> Tensor:
    """Sum of the squares of what rounding a group takes, and half precision of its grid."""
    steps = (groups - minimum[:, None]) * inverse(scale)[:, None]
    steps = (steps + 0.5).floor_().clamp_(*ends)
    kept = steps * scale.half().float()[:, None] + minimum.half().float()[:, None]
    return (kept - groups).square_().sum(dim=1)


def _halving_error(x: Tensor) -> Tensor:
    return (x - x.half().float()).abs()
