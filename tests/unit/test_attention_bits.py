"""Attention: a row has the same bits whatever it is computed beside, by any number of threads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from precast.models.kv_cache import LayerCache, fill_cache, new_cache
from precast.ops import native

ints = torch.int32
LENGTHS = (700, 330, 131, 64, 1)
"""Of the sequences in the cache: longer than a few blocks of keys, one block, one key."""
Chunk = tuple[int, int, int]
"""A sequence and the positions [begin, end) of it that a step computes."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Sequences whose keys and values are in the cache, as after a prefix hit, and all queries."""

    cache: LayerCache
    tables: Tensor
    queries: list[Tensor]
    """[length, heads, head_dim] each"""
    kv_heads: int
    options: tuple[float, int, float]
    groups: list[int]

    def step(self, chunks: Sequence[Chunk], threads: int) -> list[Tensor]:
        """The chunks' outputs, all computed by one call."""
        native.start_threads((-1,) * threads)
        sizes = [end - begin for _, begin, end in chunks]
        q = torch.cat([self.queries[s][begin:end] for s, begin, end in chunks])
        unused = torch.zeros(len(q), self.kv_heads, q.shape[2])
        out = torch.ops.precast.paged_attention(
            q,
            unused,
            unused,
            *self.cache,
            torch.full((len(q),), -1, dtype=ints),
            torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=ints),
            torch.tensor([end for _, _, end in chunks], dtype=ints),
            self.tables[[s for s, _, _ in chunks]],
            *self.options,
            self.groups,
        )
        return list(out.split(sizes))


def sequences(
    kv_dtype: str, groups: list[int], dim: int, block_size: int, window: int, softcap: float
) -> Sequences:
    torch.manual_seed(0)
    width, kv_heads = -(-max(LENGTHS) // block_size), len(groups)
    blocks = width * len(LENGTHS)
    cache = new_cache(
        kv_dtype, blocks=blocks, kv_heads=kv_heads, block_size=block_size, head_dim=dim
    )
    fill_cache(cache, *torch.randn(2, blocks * block_size, kv_heads, dim))
    return Sequences(
        cache=cache,
        tables=torch.randperm(blocks).view(len(LENGTHS), width).to(ints),
        queries=[3 * torch.randn(length, sum(groups), dim) for length in LENGTHS],
        kv_heads=kv_heads,
        options=(dim**-0.5, window, softcap),
        groups=groups,
    )


def cut(sequence: int, size: int) -> Iterator[Chunk]:
    length = LENGTHS[sequence]
    return ((sequence, at, min(at + size, length)) for at in range(0, length, size))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.view(ints), expected.view(ints))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    ("groups", "dim", "block_size", "window", "softcap"),
    [
        ([3, 3, 3], 64, 32, 0, 0.0),
        ([3, 3, 3], 64, 32, 90, 5.0),
        ([7, 1], 80, 16, 90, 0.0),
        ([2, 2], 20, 48, 0, 5.0),
    ],
)
def test_rows_have_the_same_bits_in_every_step(
    kv_dtype: str, groups: list[int], dim: int, block_size: int, window: int, softcap: float
) -> None:
    cached = sequences(kv_dtype, groups, dim, block_size, window, softcap)
    wholes = [cached.step([chunk], 1)[0] for s in range(len(LENGTHS)) for chunk in cut(s, 1000)]

    def check(chunks: Sequence[Chunk], threads: int) -> None:
        for (s, begin, end), out in zip(chunks, cached.step(chunks, threads), strict=True):
            assert_same_bits(out, wholes[s][begin:end])

    # Prompts in chunks, which other threads and tiles deal with; then all of them in one step.
    for size, threads in ((16, 1), (64, 2), (256, 2), (512, 3), (100, 5)):
        for chunk in cut(0, size):
            check([chunk], threads)
    check([chunk for s in range(len(LENGTHS)) for chunk in cut(s, 1000)], 2)
    # Decode: alone, where a context is split over threads, then together, then beside a chunk.
    for at in (0, 1, 62, 63, 64, 65, 127, 128, 400, 699):
        check([(0, at, at + 1)], 1 + at % 4)
    last = [(s, length - 1, length) for s, length in enumerate(LENGTHS)]
    check(last, 1)
    check([*last, (0, 100, 228), (1, 300, 305)], 2)
