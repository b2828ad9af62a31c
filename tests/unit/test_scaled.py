"""Weights that come quantised: parts of them are parts of what they stand for, and packing keeps
them as they are."""

import pytest
import torch

from precast.ops.packing import Format, pack, unpack
from precast.ops.scaled import ScaledWeight, below, floats, in_order

ROWS, COLUMNS = 40, 200
PARTS = [
    (slice(8, 24), slice(None)),
    (slice(None), slice(0, 96)),
    (slice(3, 4), slice(96, 192)),
    (slice(0, 40, 2), slice(16, 200)),
]


def weight(
    group: int | None, *, bits: int = 8, minima: bool = False, seed: int = 0
) -> ScaledWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group is None else -(-COLUMNS // group)
    low, high = (0, 1 << bits) if minima else (-(1 << bits - 1), 1 << bits - 1)
    values = torch.randint(low, high, (ROWS, COLUMNS), generator=generator)
    scales, lows = torch.rand((2, ROWS, groups), generator=generator).half().float()
    return ScaledWeight(
        values=values.to(torch.uint8 if minima else torch.int8),
        scales=scales,
        minima=-lows if minima else None,
        group=group,
        bits=bits,
    )


@pytest.mark.parametrize("minima", [False, True])
@pytest.mark.parametrize("group", [None, 32, 64, 40])
@pytest.mark.parametrize("part", PARTS)
def test_parts_are_parts_of_what_it_stands_for(
    part: tuple[slice, slice], group: int | None, minima: bool
) -> None:
    whole = weight(group, minima=minima)
    assert torch.equal(whole[part].floats(), whole.floats()[part])


def test_rows_of_several_lie_below_each_other() -> None:
    first, second = (weight(32, seed=seed) for seed in range(2))
    both = below([first[:8], second])
    assert isinstance(both, ScaledWeight)
    assert torch.equal(both.floats(), torch.cat([first[:8].floats(), second.floats()]))
    for other in (weight(64), weight(32, minima=True), torch.randn(8, COLUMNS)):
        mixed = below([first, other])
        assert torch.equal(floats(mixed), torch.cat([first.floats(), floats(other)]))
    order = torch.randperm(ROWS)
    assert torch.equal(floats(in_order(first, order)), first.floats()[order])


@pytest.mark.parametrize(
    ("fmt", "group", "bits", "minima"),
    [
        (Format.INT8, None, 8, False),
        (Format.Q8_0, None, 8, False),
        (Format.Q8_0, 32, 8, False),
        (Format.Q8_0, 64, 4, False),
        (Format.Q4_0, 128, 4, False),
        (Format.Q4_0, None, 2, False),
        (Format.Q4_1, 32, 4, True),
        (Format.Q4_1, 64, 4, False),
        (Format.FP32, 40, 8, True),
    ],
)
def test_packing_keeps_what_a_format_holds(
    fmt: Format, group: int | None, bits: int, minima: bool
) -> None:
    whole = weight(group, bits=bits, minima=minima)
    for part in (whole, whole[:, 64:192]):  # a rank's columns begin with a group
        rows, columns = part.shape
        packed = unpack(pack(part, fmt), rows, columns, fmt)
        assert torch.allclose(packed, part.floats(), rtol=1e-6, atol=1e-6)
