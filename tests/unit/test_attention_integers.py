"""Attention over an int8 cache, in products of integers: how exact it is, and what it makes of
numbers that have no steps."""

import pytest
import torch
from torch import Tensor

from precast.models.kv_cache import LayerCache, fill_cache, new_cache, read_cache
from precast.ops import native

ints = torch.int32
BLOCK = 32
HEADS = 3


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def cached(keys: Tensor, values: Tensor) -> LayerCache:
    """A sequence's keys and values [length, dim] of one KV head; its last block is as it was."""
    blocks, dim = -(-len(keys) // BLOCK), keys.shape[1]
    cache = new_cache("int8", blocks=blocks, kv_heads=1, block_size=BLOCK, head_dim=dim)
    fill_cache(cache, keys[:, None], values[:, None])
    return cache


def attend(q: Tensor, cache: LayerCache, length: int) -> Tensor:
    """Outputs [tokens, heads, dim] of a sequence's last tokens, whose queries are ``q``."""
    unused = torch.zeros(len(q), 1, q.shape[2])
    out: Tensor = torch.ops.precast.paged_attention(
        q,
        unused,
        unused,
        *cache,
        torch.full((len(q),), -1, dtype=ints),
        torch.tensor([0, len(q)], dtype=ints),
        torch.tensor([length], dtype=ints),
        torch.arange(len(cache.k), dtype=ints).view(1, -1),
        q.shape[2] ** -0.5,
        0,
        0.0,
    )
    return out


def exact(q: Tensor, cache: LayerCache, length: int) -> Tensor:
    """The same in float64, over what the cache holds."""
    keys, values = (part.flatten(0, 2)[:length].double() for part in read_cache(cache))
    scores = q.double() @ keys.T * q.shape[2] ** -0.5
    positions = torch.arange(length - len(q), length)
    unseen = torch.arange(length) > positions[:, None, None]
    return scores.masked_fill(unseen, -torch.inf).softmax(-1) @ values


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the mean square of what is expected."""
    difference = actual.double() - expected
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("dim", [20, 64, 80, 256])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_rounding_costs_little_of_what_a_cache_of_8_bits_does(dim: int, spread: float) -> None:
    """Flat softmaxes and peaked ones; features that are far larger than others; a first token that
    takes nearly all weight and has hardly any value, so that what is left comes of the rest."""
    length = 300
    keys, values = torch.randn(2, length, dim)
    keys[:, [1, dim // 2]] *= 20
    q = torch.randn(length, HEADS, dim) * spread
    sink = q.mean((0, 1)) + torch.randn(dim)
    q[:, 0] += sink
    keys[0] = 4 * sink / spread
    values[0] *= 1e-3
    cache = cached(keys, values)
    assert error(attend(q, cache, length), exact(q, cache, length)) < 2e-4


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e20, 1e34])
def test_values_of_any_size(size: float) -> None:
    """Those too small for steps are zeros; those that are large leave the others' outputs alone."""
    keys, values = torch.randn(2, 130, 64)
    values[100:] *= size
    cache = cached(keys, values)
    q = torch.randn(130, HEADS, 64)
    out, expected = attend(q, cache, 130), exact(q, cache, 130)
    assert error(out[:100], expected[:100]) < 2e-4
    assert error(out[100:], expected[100:]) < 2e-4


def test_zeros_are_zeros() -> None:
    keys, values = torch.randn(2, 70, 64)
    values[:, :8] = 0
    q = torch.randn(70, HEADS, 64)
    q[:, 1] = 0
    cache = cached(keys, values)
    out = attend(q, cache, 70)
    assert torch.equal(out[..., :8], torch.zeros(70, HEADS, 8))
    means = read_cache(cache).v.flatten(0, 2).cumsum(0)[:70] / torch.arange(1, 71)[:, None]
    torch.testing.assert_close(out[:, 1], means, rtol=1e-4, atol=1e-4)
    nothing = attend(q, cached(keys, torch.zeros(70, 64)), 70)
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_a_query_that_is_no_number_has_no_output_and_its_neighbours_have_theirs(odd: float) -> None:
    length = 90
    keys, values = torch.randn(2, length, 64)
    cache = cached(keys, values)
    q = torch.randn(length, HEADS, 64)
    before = attend(q, cache, length)
    q[40, 1, 5] = odd
    out = attend(q, cache, length)
    assert out[40, 1].isnan().all()
    assert attend(q[40:41], cache, 41)[0, 1].isnan().all()
    out[40, 1] = before[40, 1]
    assert torch.equal(out.view(ints), before.view(ints))


def test_a_value_that_is_infinite_reaches_those_who_see_it() -> None:
    keys, values = torch.randn(2, 90, 64)
    values[40, 3] = torch.inf
    out = attend(torch.randn(90, HEADS, 64), cached(keys, values), 90)
    assert out[:40].isfinite().all()
    assert not out[40:].isfinite().any()


@pytest.mark.parametrize("length", [1, 15, 17, 63, 70])
def test_what_lies_behind_the_last_token_is_not_used(length: int) -> None:
    keys, values = torch.randn(2, length, 64)
    cache = cached(keys, values)
    q = torch.randn(length, HEADS, 64)
    wholes = attend(q, cache, length)
    odd = torch.full((len(cache.k) * BLOCK - length, 1, 64), torch.inf)
    filled = new_cache("int8", blocks=len(cache.k), kv_heads=1, block_size=BLOCK, head_dim=64)
    fill_cache(filled, torch.cat([keys[:, None], odd]), torch.cat([values[:, None], odd]))
    assert torch.equal(attend(q, filled, length).view(ints), wholes.view(ints))
    assert torch.equal(attend(q[-1:], filled, length).view(ints), wholes[-1:].view(ints))
