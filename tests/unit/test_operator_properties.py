"""Every operator against its definition in plain torch, for shapes that nobody chose."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precast.models.kv_cache import LayerCache, fill_cache, new_cache
from precast.ops import native
from precast.ops.packing import Format, pack, unpack
from precast.ops.providers import reference

BLOCK = 16
ops = torch.ops.precast
formats = st.sampled_from(list(Format))
seeds = st.integers(0, 2**31)
Property = Callable[[Callable[..., None]], Callable[..., None]]


def examples(count: int) -> Property:
    # Always the same, so that a change that is not at fault can't fail by them. Fewer for the
    # instruction sets that this machine would not choose.
    count = count // 4 if "FEWER_EXAMPLES" in os.environ else count
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def threads() -> None:
    native.start_threads((-1, -1))


def assert_within_a_step(actual: Tensor, expected: Tensor, step: float) -> None:
    """Inputs halfway between two of their 8-bit steps may be rounded either way, but few are. With
    weights of bf16, AMX takes inputs with 16 bits."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=step + 5e-4)
    if step and actual.numel():
        assert (actual - expected).abs().median() <= step / 50 + 1e-4


@examples(120)
@given(seeds, formats, st.integers(0, 65), st.integers(1, 130), st.integers(1, 300), st.booleans())
def test_linear(seed: int, fmt: Format, m: int, n: int, k: int, with_bias: bool) -> None:
    torch.manual_seed(seed)
    x, packed = torch.randn(m, k), pack(torch.randn(n, k), fmt)
    bias = torch.randn(n) if with_bias else None
    step = 0.0
    if m and fmt >= Format.INT8:
        step = float(x.abs().max() / 127 * unpack(packed, n, k, fmt).abs().max())
    actual, expected = (f(x, packed, bias, n, int(fmt)) for f in (ops.linear, reference.linear))
    assert_within_a_step(actual, expected, step)


@examples(60)
@given(seeds, formats, st.integers(1, 70), st.integers(1, 300), st.integers(0, 65))
def test_embedding(seed: int, fmt: Format, rows: int, k: int, count: int) -> None:
    torch.manual_seed(seed)
    packed, ids = pack(torch.randn(rows, k), fmt), torch.randint(rows, (count,))
    actual, expected = (f(ids, packed, k, int(fmt)) for f in (ops.embedding, reference.embedding))
    torch.testing.assert_close(actual, expected)


@examples(60)
@given(
    seeds,
    st.sampled_from([Format.FP32, Format.BF16, Format.Q4_0, Format.INT8]),
    st.integers(0, 65),
    st.integers(1, 9),
    st.integers(1, 100),
    st.integers(1, 70),
    st.data(),
)
def test_fused_experts(
    seed: int, fmt: Format, tokens: int, experts: int, hidden: int, size: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    per_token = data.draw(st.integers(1, experts))
    gate_up, down = (
        torch.stack([pack(torch.randn(n, k) / k**0.5, fmt) for _ in range(experts)])
        for n, k in ((2 * size, hidden), (hidden, size))
    )
    chosen = torch.rand(tokens, experts).topk(per_token).indices
    weights = torch.rand(tokens, per_token) / per_token
    more: tuple[Tensor | float | None, ...] = ()
    if data.draw(st.booleans()):
        more = (torch.randn(experts, 2 * size), torch.randn(experts, hidden), 0.7)
    arguments = (torch.randn(tokens, hidden), chosen, weights, gate_up, down, size, int(fmt), *more)
    actual, expected = (f(*arguments) for f in (ops.fused_experts, reference.fused_experts))
    # The inner activations are rounded too, each by up to a step of its group.
    assert_within_a_step(actual, expected, 0.1 if fmt >= Format.INT8 else 0.0)


@examples(60)
@given(seeds, st.integers(0, 65), st.integers(1, 5), st.integers(1, 150), st.booleans())
def test_rms_norm(seed: int, rows: int, heads: int, size: int, strided: bool) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, 3 * heads, size)[:, heads : 2 * heads]
    x = x if strided else x.contiguous()
    weight = torch.randn(size)
    actual, expected = (f(x, weight, 1e-5) for f in (ops.rms_norm, reference.rms_norm))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@examples(60)
@given(seeds, st.integers(0, 65), st.integers(1, 5), st.integers(1, 70), st.integers(0, 30))
def test_rotary(seed: int, rows: int, heads: int, half: int, still: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, 3 * heads, 2 * half + still)[:, heads : 2 * heads]
    cos, sin = torch.rand(rows, half), torch.rand(rows, half)
    actual, expected = (f(x, cos, sin) for f in (ops.rotary, reference.rotary))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@examples(60)
@given(seeds, st.integers(0, 65), st.integers(1, 300), st.sampled_from([0.1, 1.0, 30.0, 1000.0]))
def test_gated_activations(name: str, seed: int, rows: int, size: int, scale: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, 2 * size) * scale
    actual, expected = getattr(ops, name)(x), getattr(reference, name)(x.double()).float()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@examples(60)
@given(seeds, st.integers(0, 9), st.integers(1, 300), st.sampled_from([1e-4, 1.0, 100.0]))
def test_soft_cap(seed: int, rows: int, size: int, scale: float) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, size) * scale
    actual, expected = (f(x, 30.0) for f in (ops.soft_cap, reference.soft_cap))
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    assert ops.soft_cap(torch.tensor([[float("nan")]]), 30.0).isnan().all()


@examples(60)
@given(seeds, st.integers(0, 9), st.integers(1, 200), st.data(), st.booleans())
def test_route(seed: int, rows: int, experts: int, data: st.DataObject, normalize: bool) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(rows, experts) * 3
    wanted = data.draw(st.integers(1, experts))
    chosen, weights = ops.route(scores, wanted, normalize)
    same, expected = reference.route(scores, wanted, normalize)
    assert torch.equal(chosen, same)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)


def test_route_gives_experts_that_exist_whatever_the_scores() -> None:
    scores = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), 0.0, 0.0], [1.0, 1.0, 1.0]])
    chosen, weights = ops.route(scores, 3, True)
    assert chosen.sort(dim=1).values.tolist() == [[0, 1, 2]] * 3
    assert chosen[2].tolist() == [0, 1, 2]
    assert weights[:2].isnan().any(dim=1).all()


@examples(100)
@given(seeds, st.integers(0, 65), st.integers(1, 5000), st.sampled_from([1, 3, 1000]))
def test_largest(seed: int, rows: int, size: int, distinct: int) -> None:
    """The first of equals, wherever in a row it is."""
    torch.manual_seed(seed)
    x = torch.randint(-distinct, distinct, (rows, size)).float()
    values, places = ops.largest(x)
    assert torch.equal(values, x.amax(dim=1))
    assert places.tolist() == [row.index(max(row)) for row in x.tolist()]


@pytest.mark.parametrize("size", [1, 16, 63, 1025, 4000])
def test_largest_of_no_numbers(size: int) -> None:
    """A place within the row whatever it holds; NaN wherever a NaN is."""
    x = torch.full((3, size), -float("inf"))
    x[1, size // 2] = float("nan")
    x[2] = float("nan")
    values, places = ops.largest(x)
    assert places.tolist() == [0, 0, 0]
    assert values.isnan().tolist() == [False, True, True]
    assert float(values[0]) == -float("inf")


@dataclass(frozen=True, kw_only=True)
class Attention:
    """A step, and a cache that holds its keys and values already."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerCache
    paging: tuple[Tensor, Tensor, Tensor]
    options: tuple[float, int, float]
    groups: list[int]
    sinks: Tensor | None

    def run(self, kernel: Callable[..., Tensor]) -> Tensor:
        # Nothing is written: a value halfway between two steps of a cache may go either way.
        nowhere = torch.full((len(self.q),), -1, dtype=torch.int32)
        return kernel(
            self.q,
            self.k,
            self.v,
            *self.cache,
            nowhere,
            *self.paging,
            *self.options,
            self.groups,
            self.sinks,
        )


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    torch.manual_seed(draw(seeds))
    groups = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    heads, dim, width = len(groups), draw(st.integers(1, 130)), draw(st.integers(1, 6))
    full = width * BLOCK
    edges = st.sampled_from([0, 1, BLOCK - 1, BLOCK, min(BLOCK + 1, full), full])
    contexts = draw(st.lists(edges | st.integers(0, full), max_size=17))
    new = [draw(st.sampled_from([1, min(1, n), max(1, n)]) | st.integers(0, n)) for n in contexts]
    blocks = max(1, width * len(contexts))
    cache = new_cache(
        draw(st.sampled_from(["fp32", "bf16", "int8"])),
        blocks=blocks,
        kv_heads=heads,
        block_size=BLOCK,
        head_dim=dim,
    )
    fill_cache(cache, *torch.randn(2, blocks * BLOCK, heads, dim))
    paging = (
        torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32),
        torch.tensor(contexts, dtype=torch.int32),
        torch.randperm(blocks)[: width * len(contexts)].view(-1, width).to(torch.int32),
    )
    tokens = sum(new) + draw(st.integers(0, 3))
    window = draw(st.sampled_from([0, 0, 1, 7, BLOCK, 40]))
    return Attention(
        q=torch.randn(tokens, sum(groups), dim),
        k=torch.randn(tokens, heads, dim),
        v=torch.randn(tokens, heads, dim),
        cache=cache,
        paging=paging,
        options=(dim**-0.5, window, draw(st.sampled_from([0.0, 0.0, 5.0]))),
        groups=groups,
        sinks=torch.randn(sum(groups)) * size if (size := draw(st.integers(0, 50))) else None,
    )


@examples(200)
@given(attentions())
def test_paged_attention(step: Attention) -> None:
    # Queries and weights have 16 bits: AMX's as sums of two bf16, int8's as integers.
    kind = step.cache.k.dtype
    rounded = kind == torch.int8 or (native.native_isa() == "amx" and kind == torch.bfloat16)
    atol = 3e-4 if rounded else 1e-5
    torch.testing.assert_close(
        step.run(ops.paged_attention), step.run(reference.paged_attention), rtol=1e-4, atol=atol
    )
