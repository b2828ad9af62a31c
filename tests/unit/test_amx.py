"""AMX: linears and attention over int8 have AVX-512's bits, attention over bf16 its own with
matrices and without."""

import hashlib

import pytest
import torch
from torch import Tensor

from precast.models.kv_cache import fill_cache, new_cache
from precast.ops import native
from precast.ops.gguf_types import BLOCKS
from precast.ops.packing import Format, pack
from precast.system.cpu import this_cpu
from tests.support import gguf_kernels
from tests.support.other_isa import output_with

QUANTIZED = [Format.INT8, Format.Q8_0, Format.Q4_0, Format.Q4_1]
ROWS = (1, 7, 11, 12, 16, 17, 30, 65)
"""Fewer than matrices are worth, whole ones, and parts of one."""
ints = torch.int32
needs_matrices = pytest.mark.skipif(not this_cpu().amx, reason="no AMX in use")


def linear_digest() -> str:
    """Of the outputs of every format, and of every type of a file, for inputs that end within a
    group or a block and outputs that end within a panel."""
    torch.manual_seed(0)
    native.start_threads((-1, -1))
    digest = hashlib.blake2b()
    for fmt in QUANTIZED:
        for n, k in ((40, 100), (48, 576), (16, 30)):
            packed, bias = pack(torch.randn(n, k), fmt), torch.randn(n)
            for rows in ROWS:
                y = torch.ops.precast.linear(torch.randn(rows, k), packed, bias, n, int(fmt))
                digest.update(y.numpy().tobytes())
    for kind in gguf_kernels.QUANTIZED:
        k = 3 * BLOCKS[kind].inputs
        weight = gguf_kernels.packed([gguf_kernels.random_rows(kind, 40, k)])
        for rows in ROWS:
            y = torch.ops.precast.linear(torch.randn(rows, k), weight, None, 40, int(Format.MIXED))
            digest.update(y.numpy().tobytes())
    return digest.hexdigest()


def attention_digest() -> str:
    """Of attention over int8, of heads that fill matrices and of others, few rows and many."""
    torch.manual_seed(0)
    native.start_threads((-1, -1))
    digest = hashlib.blake2b()
    for dim in (16, 32, 64, 80, 144):
        q, keys, values = torch.randn(150, 5, dim), *torch.randn(2, 150, 1, dim)
        for begin in (0, 70, 145, 147):
            digest.update(attend(q, keys, values, begin, "int8").numpy().tobytes())
    return digest.hexdigest()


@needs_matrices
def test_linears_and_attention_over_int8_have_the_bits_of_avx512() -> None:
    names = "linear_digest, attention_digest"
    program = f"from tests.unit.test_amx import {names}; print(linear_digest(), attention_digest())"
    assert output_with("avx512", "-c", program).split() == [linear_digest(), attention_digest()]


def attend(q: Tensor, keys: Tensor, values: Tensor, begin: int, kv_dtype: str = "bf16") -> Tensor:
    """Outputs [tokens, heads, dim] of the tokens from ``begin`` on, over a cache which has no
    numbers where no token is. One KV head."""
    length, dim = len(keys), keys.shape[-1]
    blocks = -(-length // 32)
    cache = new_cache(kv_dtype, blocks=blocks, kv_heads=1, block_size=32, head_dim=dim)
    rest = torch.full((blocks * 32 - length, 1, dim), torch.nan)
    fill_cache(cache, torch.cat([keys, rest]), torch.cat([values, rest]))
    new = length - begin
    unused = torch.zeros(new, 1, dim)
    out: Tensor = torch.ops.precast.paged_attention(
        q[begin:],
        unused,
        unused,
        *cache,
        torch.full((new,), -1, dtype=ints),
        torch.tensor([0, new], dtype=ints),
        torch.tensor([length], dtype=ints),
        torch.arange(blocks, dtype=ints).view(1, -1),
        dim**-0.5,
        0,
        0.0,
    )
    return out


@pytest.mark.parametrize("smallest", [0, -70, -130])
@pytest.mark.parametrize("length", [1, 33, 63, 101])
def test_few_rows_and_many_have_the_same_bits(smallest: int, length: int) -> None:
    """Of numbers whose products are too small for normal floats as well; and what lies behind the
    last token in the cache is not used."""
    torch.manual_seed(0)
    native.start_threads((-1, -1))
    scale = 2.0**smallest
    q, keys = torch.randn(length, 3, 64), torch.randn(length, 1, 64)
    values = torch.randn(length, 1, 64) * scale
    keys *= torch.where(torch.rand(length, 1, 64) < 0.5, scale, 1.0)
    many = attend(q, keys, values, 0)
    assert many.isfinite().all()
    few = attend(q, keys, values, length - 1)
    assert torch.equal(few.view(ints), many[-1:].view(ints))
    two = attend(q, keys, values, max(0, length - 2))
    assert torch.equal(two.view(ints), many[-len(two) :].view(ints))
