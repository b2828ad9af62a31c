"""Small numbers out of 32-bit words, and checks of what belongs to them."""

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from precast.errors import ModelCorrupt
from precast.ops.scaled import ScaledWeight

WORD: Final = 32


def unpacked(words: Tensor, bits: int, *, by_rows: bool, order: tuple[int, ...] = ()) -> Tensor:
    """uint8 numbers out of int32 words, the lowest bits first: words lie along the columns, or with
    ``by_rows`` along the rows. ``order``: which of a word's numbers come where; as they lie if
    empty."""
    count = WORD // bits
    places = order or tuple(range(count))
    parts = [(words >> (bits * place)).bitwise_and_((1 << bits) - 1) for place in places]
    stacked = torch.stack([part.to(torch.uint8) for part in parts], dim=1 if by_rows else 2)
    return stacked.flatten(0, 1) if by_rows else stacked.flatten(1, 2)


def signed(values: Tensor, bits: int) -> Tensor:
    """int8 of numbers that were stored with half of their range added."""
    return (values.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def finite(scales: Tensor, name: str) -> Tensor:
    """float32 scales. Raises ModelCorrupt if one is none."""
    scales = scales.float()
    if not bool(torch.isfinite(scales).all()):
        raise ModelCorrupt(f"{name}: a scale is not finite")
    return scales


def by_input(weight: ScaledWeight, groups: Tensor, name: str) -> ScaledWeight:
    """A weight whose inputs belong to ``groups``, int32 [K], in any order; as it was if they lie
    side by side. Raises ModelCorrupt for a group that is not there."""
    inputs, size = weight.shape[1], weight.group or weight.shape[1]
    count = weight.scales.shape[1]
    places = groups.long()
    if not bool(((places >= 0) & (places < count)).all()):
        raise ModelCorrupt(f"{name}: an input's group is none of {count}")
    if torch.equal(places, torch.arange(inputs) // size):
        return weight
    minima = None if weight.minima is None else weight.minima[:, places]
    return replace(weight, scales=weight.scales[:, places], minima=minima, group=1)
