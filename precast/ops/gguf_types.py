"""Types of tensors in GGUF files: how many bytes they take, and which kernel runs them.

Needs no torch: an import looks here before anything large is read.
"""

from enum import IntEnum
from typing import Final, NamedTuple


class GgufType(IntEnum):
    """The types that are read; numbers as in the files."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30
    MXFP4 = 39


class Blocks(NamedTuple):
    inputs: int
    """Values of a block, all of one row."""
    nbytes: int
    scales: tuple[int, ...] = ()
    """Where its fp16 scales and minima are."""
    packed: int = 0
    """Bytes that it takes in the kernels' layout, if not ``nbytes``."""
    padded: int = 1
    """Values that a packed row is a multiple of."""


BLOCKS: Final = {
    GgufType.F32: Blocks(1, 4),
    GgufType.F16: Blocks(1, 2),
    GgufType.BF16: Blocks(1, 2),
    GgufType.Q4_0: Blocks(32, 18, (0,), padded=64),
    GgufType.Q4_1: Blocks(32, 20, (0, 2), padded=64),
    GgufType.Q5_0: Blocks(32, 22, (0,), padded=64),
    GgufType.Q5_1: Blocks(32, 24, (0, 2), padded=64),
    GgufType.Q8_0: Blocks(32, 34, (0,), padded=64),
    GgufType.Q2_K: Blocks(256, 84, (80, 82), packed=272),
    GgufType.Q3_K: Blocks(256, 110, (108,), packed=212),
    GgufType.Q4_K: Blocks(256, 144, (0, 2), packed=148),
    GgufType.Q5_K: Blocks(256, 176, (0, 2), packed=180),
    GgufType.Q6_K: Blocks(256, 210, (208,), packed=212),
    GgufType.IQ4_NL: Blocks(32, 18, (0,), padded=64),
    GgufType.IQ4_XS: Blocks(256, 136, (0,), packed=140),
    GgufType.MXFP4: Blocks(32, 17, padded=128),
}
PLAIN: Final = (GgufType.F32, GgufType.F16, GgufType.BF16)
"""Numbers as they are, without blocks."""
ROUNDED: Final = (GgufType.Q2_K,)
"""Types that no kernel runs as they are: packed as Q8_0, off by 1/254 of a group's largest at the
most."""


def row_bytes(kind: GgufType, columns: int) -> int:
    """Of a row of ``columns`` values, whole blocks."""
    return columns // BLOCKS[kind].inputs * BLOCKS[kind].nbytes


def packed_row_bytes(kind: GgufType, columns: int) -> int:
    """Of a packed row."""
    block = BLOCKS[kind]
    values = -(-columns // block.padded) * block.padded
    return values // block.inputs * (block.packed or block.nbytes)
