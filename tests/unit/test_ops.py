"""Native operators against plain torch, for shapes that are multiples of nothing convenient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from precast.ops import native
from precast.ops.packing import pack_float, pack_int8, quantize_int8

SHAPES = [(1, 1), (7, 5), (16, 64), (33, 66), (48, 576), (100, 257)]
BATCHES = [1, 2, 3, 5, 8, 13, 65]
BLOCK = 8


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_agrees_with_torch(n: int, k: int, dtype: torch.dtype, with_bias: bool) -> None:
    weight = torch.randn(n, k).to(dtype)
    bias = torch.randn(n) if with_bias else None
    for m in BATCHES:
        x = torch.randn(m, k)
        expected = torch.nn.functional.linear(x.double(), weight.double())
        expected = expected + bias.double() if bias is not None else expected
        actual = torch.ops.precast.linear(x, pack_float(weight), bias, n)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_w8a8_agrees_with_exact_integer_arithmetic(n: int, k: int) -> None:
    weight, bias = torch.randn(n, k), torch.randn(n)
    quantized, scales = quantize_int8(weight)
    packed, packed_scales, sums = pack_int8(weight)
    for m in BATCHES:
        x = torch.randn(m, k)
        x[0] = 0  # a row of zeros has no scale
        x_scales = x.abs().amax(dim=1, keepdim=True) / 127
        steps = torch.where(x_scales > 0, x / x_scales, torch.zeros_like(x)).round()
        exact = steps.double() @ quantized.double().T
        expected = exact * x_scales.double() * scales.double() + bias.double()
        actual = torch.ops.precast.linear_w8a8(x, packed, packed_scales, sums, bias, n)
        # A value halfway between two steps may go either way: one step of one input at the most.
        tolerance = float(x_scales.max() * scales.max() * 127) * 1.01 + 1e-5
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=tolerance)
        assert (actual.double() - expected).abs().median() < 1e-5


def test_int8_extremes_do_not_saturate() -> None:
    weight = torch.full((16, 512), 1.0)
    packed = pack_int8(weight)
    for sign in (1.0, -1.0):
        y = torch.ops.precast.linear_w8a8(torch.full((1, 512), sign), *packed, None, 16)
        torch.testing.assert_close(y, torch.full((1, 16), sign * 512.0), rtol=1e-5, atol=0)


def reference_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, contexts: list[int], scale: float
) -> Tensor:
    """One sequence: token i of q attends to its first contexts[i] cached tokens."""
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    keys = k_cache[table.long()].permute(1, 0, 2, 3).reshape(kv_heads, -1, q.shape[2])
    values = v_cache[table.long()].permute(1, 0, 2, 3).reshape(kv_heads, -1, q.shape[2])
    keys = keys.repeat_interleave(heads // kv_heads, dim=0)
    values = values.repeat_interleave(heads // kv_heads, dim=0)
    rows = []
    for i, context in enumerate(contexts):
        scores = torch.einsum("hd,htd->ht", q[i], keys[:, :context]) * scale
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values[:, :context]))
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 32), (6, 2, 20)])
def test_paged_attention_agrees_with_torch(heads: int, kv_heads: int, dim: int) -> None:
    """Ragged: a prefill, a later chunk of a prefill, two decodes and a padded row in one call."""
    new = [11, 5, 1, 1, 1]
    contexts = [11, 21, 1, 40, 0]
    width, total = 6, sum(new)
    blocks = 64
    tables = torch.randperm(blocks)[: len(new) * width].view(len(new), width).to(torch.int32)
    k_cache, v_cache = torch.randn(2, blocks, kv_heads, BLOCK, dim).unbind(0)
    k_cache, v_cache = k_cache.contiguous(), v_cache.contiguous()
    q = torch.randn(total, heads, dim)
    k, v = torch.randn(total, kv_heads, dim), torch.randn(total, kv_heads, dim)
    slots = [
        int(tables[s, at // BLOCK]) * BLOCK + at % BLOCK if contexts[s] else -1
        for s, count in enumerate(new)
        for at in range(contexts[s] - count, contexts[s])
    ]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected_k[slot // BLOCK, :, slot % BLOCK] = k[token]
            expected_v[slot // BLOCK, :, slot % BLOCK] = v[token]
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    out = torch.ops.precast.paged_attention(
        q,
        k,
        v,
        k_cache,
        v_cache,
        torch.tensor(slots, dtype=torch.int32),
        starts,
        torch.tensor(contexts, dtype=torch.int32),
        tables,
        dim**-0.5,
    )
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)
    for s, count in enumerate(new):
        begin = int(starts[s])
        mine = out[begin : begin + count]
        if contexts[s] == 0:
            assert torch.equal(mine, torch.zeros_like(mine))
            continue
        lengths = list(range(contexts[s] - count + 1, contexts[s] + 1))
        expected = reference_attention(
            q[begin : begin + count], expected_k, expected_v, tables[s], lengths, dim**-0.5
        )
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def attention_arguments() -> list[object]:
    ints = torch.int32
    return [
        torch.randn(2, 4, 16),
        torch.randn(2, 2, 16),
        torch.randn(2, 2, 16),
        torch.randn(4, 2, BLOCK, 16),
        torch.randn(4, 2, BLOCK, 16),
        torch.tensor([3, 17], dtype=ints),
        torch.tensor([0, 1, 2], dtype=ints),
        torch.tensor([4, 2], dtype=ints),
        torch.tensor([[0], [2]], dtype=ints),
        0.25,
    ]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (5, torch.tensor([3, 1000], dtype=torch.int32), "slot 1000 is outside"),
        (7, torch.tensor([4, 99], dtype=torch.int32), "does not fit the block table"),
        (8, torch.tensor([[0], [9]], dtype=torch.int32), "block 9 is outside"),
        (3, torch.randn(4, 3, BLOCK, 16), "caches must be"),
        (5, torch.tensor([3], dtype=torch.int32), "shapes do not agree"),
    ],
)
def test_paged_attention_refuses_what_would_leave_its_memory(
    position: int, value: Tensor, message: str
) -> None:
    arguments = attention_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.precast.paged_attention(*arguments)


def test_linears_refuse_unpacked_weights() -> None:
    with pytest.raises(RuntimeError, match="packed as"):
        torch.ops.precast.linear(torch.randn(1, 8), torch.randn(16, 8), None, 16)
    packed, scales, sums = pack_int8(torch.randn(16, 8))
    with pytest.raises(RuntimeError, match="packed as"):
        torch.ops.precast.linear_w8a8(torch.randn(1, 12), packed, scales, sums, None, 16)


def test_collectives_need_a_group() -> None:
    with pytest.raises(RuntimeError, match="joined no tensor-parallel group"):
        torch.ops.precast.all_reduce(torch.zeros(4))


def test_operators_trace() -> None:
    """Schemas, mutation and fakes hold what they promise (torch.library.opcheck)."""
    ops = torch.ops.precast
    tests = ("test_schema", "test_faketensor")
    packed = pack_float(torch.randn(20, 8))
    torch.library.opcheck(ops.linear, (torch.randn(3, 8), packed, None, 20), test_utils=tests)
    torch.library.opcheck(
        ops.linear_w8a8,
        (torch.randn(3, 8), *pack_int8(torch.randn(20, 8)), None, 20),
        test_utils=tests,
    )
    torch.library.opcheck(ops.paged_attention, tuple(attention_arguments()), test_utils=tests)


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    """The same tests for the kernels that this CPU would not choose."""
    if os.environ.get("PRECAST_NATIVE_ISA"):
        pytest.skip("is the inner run")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__)), "-p", "no:cacheprovider"],
        env={**os.environ, "PRECAST_NATIVE_ISA": isa},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert run.returncode == 0, run.stdout[-2000:]


def test_an_unknown_instruction_set_is_named() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from precast.ops import native; native.native_isa()"],
        env={**os.environ, "PRECAST_NATIVE_ISA": "sse9"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode != 0
    assert "PRECAST_NATIVE_ISA=sse9" in run.stderr
