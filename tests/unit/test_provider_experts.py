"""Mixtures of experts on upstream's kernels: a stand-in's, or the real ones where installed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from precast.graphs.capture.export import (
    Span,
    eager_step,
    random_cache,
    step_inputs,
    verification_plan,
)
from precast.graphs.factors import needs_of
from precast.models.layers import Shape
from precast.models.load import random_weights
from precast.models.options import ExpertOptions
from precast.models.shape import ModelShape
from precast.ops import providers
from precast.ops.packing import Format, pack
from precast.ops.providers import reference, sgl_kernel
from precast.ops.providers.base import Selection
from tests.support.upstream_kernels import BF16, RUNS, loaded

BLOCK = 16
ops = torch.ops.precast


@pytest.fixture(autouse=True)
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    with loaded(monkeypatch):
        yield
    providers.start(providers.select("native", BF16))


def with_experts(selection: Selection) -> Selection:
    """Skips where upstream's own has none on this CPU."""
    if selection.pack_experts is None:
        pytest.skip(selection.choices["fused_experts"].reason)
    return selection


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("experts", [1, 4, 16, 128])
def test_upstream_router_agrees(experts: int, normalize: bool) -> None:
    scores, per_token = torch.randn(5, experts) * 3, min(experts, 3)
    expected = reference.route(scores, per_token, normalize)
    providers.start(sgl_kernel.select(replace(BF16, experts=experts), RUNS))
    chosen, weights = ops.route(scores, per_token, normalize)
    assert torch.equal(chosen, expected[0])
    torch.testing.assert_close(weights, expected[1], rtol=1e-5, atol=1e-6)


def mixture(
    fmt: Format, size: int, hidden: int, pack_all: Callable[..., Tensor]
) -> tuple[Any, ...]:
    """The last arguments of ``fused_experts``, for eight experts."""
    generator = torch.Generator().manual_seed(3)
    gate_up = torch.randn(8, 2 * size, hidden, generator=generator) / hidden**0.5
    down = torch.randn(8, hidden, size, generator=generator) / size**0.5
    return pack_all(gate_up, 2, fmt), pack_all(down, 1, fmt), size, int(fmt)


def pack_each(weights: Tensor, parts: int, fmt: Format) -> Tensor:
    """As the native kernels want them."""
    return torch.stack([pack(weight, fmt) for weight in weights])


@pytest.mark.parametrize("fmt", [Format.BF16, Format.FP16, Format.INT8])
@pytest.mark.parametrize(("size", "hidden"), [(32, 64), (37, 100)])
@pytest.mark.parametrize("rows", [0, 3, 50])
def test_upstream_experts_agree(fmt: Format, size: int, hidden: int, rows: int) -> None:
    """Any shape. Upstream has a kernel for up to four rows an expert and one for more."""
    x = torch.randn(rows, hidden)
    chosen, weights = reference.route(torch.randn(rows, 8), 2, True)
    native = mixture(fmt, size, hidden, pack_each)
    expected = reference.fused_experts(x, chosen, weights, *native)
    selection = with_experts(sgl_kernel.select(replace(BF16, formats=frozenset({fmt})), RUNS))
    providers.start(selection)
    packed = mixture(fmt, size, hidden, selection.pack_experts or pack_each)
    actual = ops.fused_experts(x, chosen, weights, *packed)
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


def test_they_trace() -> None:
    """Schemas, mutation, fakes and functionalisation (torch.library.opcheck)."""
    selection = with_experts(sgl_kernel.select(BF16, RUNS))
    providers.start(selection)
    torch.library.opcheck(ops.route, (torch.randn(5, 8), 3, True))
    routed = reference.route(torch.randn(3, 8), 2, True)
    experts = mixture(Format.BF16, 5, 8, selection.pack_experts or pack_each)
    torch.library.opcheck(ops.fused_experts, (torch.randn(3, 8), *routed, *experts))


def small_mixture(quantization: str) -> Shape:
    return ModelShape(
        architecture="mixtral",
        hidden_size=64,
        query_groups=(2, 2),
        head_dim=32,
        intermediate_size=48,
        vocab_widths=(100,),
        vocab_size=100,
        rms_norm_eps=1e-5,
        options=ExpertOptions(experts=8, experts_per_token=2, expert_size=48, normalize=True),
        weight_dtype="bf16",
        quantization=quantization,
        head_quantization=quantization,
        kv_dtype="bf16",
    )


def logits(shape: Shape, selection: Selection) -> Tensor:
    """Of a prompt and of a token far behind one."""
    providers.start(selection)
    generator = torch.Generator().manual_seed(1)
    weights = random_weights(shape, verification_plan(shape, 1), 64, generator)
    spans = [Span(new=3, context=3), Span(new=1, context=9)]
    inputs = step_inputs(shape, BLOCK, spans, torch.Generator().manual_seed(2))
    caches = [random_cache(shape, BLOCK, torch.Generator().manual_seed(3))]
    return eager_step(shape, inputs, weights, caches, None)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_model_runs_on_them(quantization: str) -> None:
    """Loaded as a rank loads it: packed together, beside weights that are packed one by one."""
    shape = small_mixture(quantization)
    expected = logits(shape, providers.select("native", needs_of(shape)))
    actual = logits(shape, with_experts(sgl_kernel.select(needs_of(shape), RUNS)))
    bound = 0.05 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)
