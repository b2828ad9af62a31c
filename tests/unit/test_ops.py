"""Paged attention against plain torch, what operators refuse, and every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from precast.models.kv_cache import LayerCache, fill_cache, new_cache, read_cache
from precast.ops import native
from precast.ops.packing import Format, pack
from precast.system.cpu import this_cpu

BLOCK = 16
FILES = [
    str(Path(__file__).with_name(f"test_{name}.py"))
    for name in ("ops", "linear", "operator_properties", "attention_bits")
]
OWN_FILES = {
    "amx": [*FILES, str(Path(__file__).with_name("test_amx.py"))],
    "avxvnni": [str(Path(__file__).with_name("test_linear.py"))],
}
"""Where they are not ``FILES``: AVX-VNNI has linears of its own and nothing else."""
RUNS = {"scalar": True, "avx2": True, "avxvnni": this_cpu().avxvnni, "amx": this_cpu().amx}
OTHERS = [isa for isa, there in RUNS.items() if there and isa != native.native_isa()]
"""What this CPU runs and would not choose."""
FEWER = "FEWER_EXAMPLES"
INNER = ["--deselect", "tests/unit/test_ops.py::test_other_instruction_sets"]


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def reference_attention(
    q: Tensor, keys: Tensor, values: Tensor, positions: list[int], window: int, softcap: float
) -> Tensor:
    """One sequence: q [T, heads, D]; keys and values [kv_heads, tokens, D]."""
    group = q.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, dim=0), values.repeat_interleave(group, dim=0)
    rows = []
    for i, position in enumerate(positions):
        first = max(0, position + 1 - window) if window else 0
        seen = slice(first, position + 1)
        scores = torch.einsum("hd,htd->ht", q[i], keys[:, seen]) * q.shape[2] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values[:, seen]))
    return torch.stack(rows)


NEW = [11, 5, 1, 1, 1, 70]
"""A prefill, a later chunk of one, two decodes, a padded row, a prefill of several tiles."""
CONTEXTS = [11, 21, 1, 90, 0, 70]
LONG = [1, 1]
LONG_CONTEXTS = [2000, 700]
"""Two sequences alone: their contexts are split over the threads."""


@pytest.mark.parametrize(("new", "contexts"), [(NEW, CONTEXTS), (LONG, LONG_CONTEXTS)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 32), (6, 2, 20), (8, 1, 80)]
)
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (19, 0.0), (0, 3.0)])
def test_paged_attention_agrees_with_torch(
    new: list[int],
    contexts: list[int],
    heads: int,
    kv_heads: int,
    dim: int,
    kv_dtype: str,
    window: int,
    softcap: float,
) -> None:
    width, total = -(-max(contexts) // BLOCK), sum(new)
    blocks = width * len(new) + 3
    tables = torch.randperm(blocks)[: len(new) * width].view(len(new), width).to(torch.int32)
    cache = new_cache(kv_dtype, blocks=blocks, kv_heads=kv_heads, block_size=BLOCK, head_dim=dim)
    slots_total = blocks * BLOCK
    fill_cache(
        cache, torch.randn(slots_total, kv_heads, dim), torch.randn(slots_total, kv_heads, dim)
    )
    before = read_cache(cache)
    q = torch.randn(total, heads, dim)
    k, v = torch.randn(total, kv_heads, dim), torch.randn(total, kv_heads, dim)
    slots = [
        int(tables[s, at // BLOCK]) * BLOCK + at % BLOCK if contexts[s] else -1
        for s, count in enumerate(new)
        for at in range(contexts[s] - count, contexts[s])
    ]
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    out = torch.ops.precast.paged_attention(
        q,
        k,
        v,
        *cache,
        torch.tensor(slots, dtype=torch.int32),
        starts,
        torch.tensor(contexts, dtype=torch.int32),
        tables,
        dim**-0.5,
        window,
        softcap,
    )
    after = read_cache(cache)
    check_cache(before, after, slots, k, v, kv_dtype)
    for s, count in enumerate(new):
        begin = int(starts[s])
        mine = out[begin : begin + count]
        if contexts[s] == 0:
            assert torch.equal(mine, torch.zeros_like(mine))
            continue
        keys, values = (
            part[tables[s].long()].transpose(0, 1).reshape(kv_heads, -1, dim) for part in after
        )
        positions = list(range(contexts[s] - count, contexts[s]))
        expected = reference_attention(
            q[begin : begin + count], keys, values, positions, window, softcap
        )
        # Queries and weights have 16 bits: AMX's as sums of two bf16, int8's as integers.
        rounded = kv_dtype == "int8" or (native.native_isa() == "amx" and kv_dtype == "bf16")
        atol = 3e-4 if rounded else 1e-5
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=atol)


def test_keys_and_values_are_rounded_as_torch_does() -> None:
    """Ties to even, NaN and infinity as they are; both halves of an odd head."""
    ints = torch.int32
    ties = torch.arange(0x3F800000, 0x3F800000 + 4 * 0x8000, 0x8000, dtype=ints).view(torch.float32)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.4e38, -1e-45, 1e-39])
    values = torch.cat([ties, -ties, odd, torch.randn(22) * 1e20]).view(1, 1, -1)
    dim = values.shape[2]
    cache = new_cache("bf16", blocks=1, kv_heads=1, block_size=BLOCK, head_dim=dim)
    one = torch.tensor([1], dtype=ints)
    torch.ops.precast.paged_attention(
        values, values, values, *cache, one, torch.tensor([0, 1], dtype=ints), one,
        torch.zeros(1, 1, dtype=ints), 1.0, 0, 0.0,
    )  # fmt: skip
    wanted = values[0, 0].to(torch.bfloat16)
    for stored in (cache.k[0, 0, :, 1], cache.v[0, 0, 1]):
        both_nan = stored.isnan() & wanted.isnan()
        assert torch.equal(stored[~both_nan].view(torch.int16), wanted[~both_nan].view(torch.int16))
        assert int(both_nan.sum()) == 1


def check_cache(
    before: LayerCache, after: LayerCache, slots: list[int], k: Tensor, v: Tensor, kv_dtype: str
) -> None:
    """New keys and values are in their slots, as exact as the type allows; nothing else changed."""
    tolerance = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.51 / 127}[kv_dtype]
    untouched = torch.ones(before.k.shape[0] * BLOCK, dtype=torch.bool)
    for part, old, new in ((after.k, before.k, k), (after.v, before.v, v)):
        flat, old_flat = (t.transpose(1, 2).reshape(-1, *new.shape[1:]) for t in (part, old))
        for token, slot in enumerate(slots):
            if slot < 0:
                continue
            untouched[slot] = False
            scale = (
                new[token].abs() if kv_dtype == "bf16" else new[token].abs().amax(-1, keepdim=True)
            )
            assert ((flat[slot] - new[token]).abs() <= scale * tolerance).all()
        assert torch.equal(flat[untouched], old_flat[untouched])


def attention_arguments() -> list[object]:
    ints = torch.int32
    return [
        torch.randn(2, 4, 16),
        torch.randn(2, 2, 16),
        torch.randn(2, 2, 16),
        *new_cache("fp32", blocks=4, kv_heads=2, block_size=BLOCK, head_dim=16),
        torch.tensor([3, 33], dtype=ints),
        torch.tensor([0, 1, 2], dtype=ints),
        torch.tensor([4, 2], dtype=ints),
        torch.tensor([[0], [2]], dtype=ints),
        0.25,
        0,
        0.0,
        [3, 1],
    ]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (5, torch.tensor([3, 1000], dtype=torch.int32), "slot 1000 is outside"),
        (7, torch.tensor([4, 99], dtype=torch.int32), "does not fit the block table"),
        (8, torch.tensor([[0], [9]], dtype=torch.int32), "block 9 is outside"),
        (3, torch.randn(4, 3, 16, BLOCK), "caches must be"),
        (3, torch.zeros(4, 2, 16, BLOCK, dtype=torch.float64), "caches must be"),
        (10, -1, "can't be negative"),
        (5, torch.tensor([3], dtype=torch.int32), "shapes do not agree"),
        (12, [4], "4 query heads don't fit 2 KV heads"),
        (12, [3, 2], r"groups \[3, 2\] of 4 query heads"),
        (12, [4, 0], "0 query heads for a KV head"),
    ],
)
def test_paged_attention_refuses_what_would_leave_its_memory(
    position: int, value: object, message: str
) -> None:
    arguments = attention_arguments()
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.precast.paged_attention(*arguments)


def test_collectives_need_a_group() -> None:
    with pytest.raises(RuntimeError, match="joined no tensor-parallel group"):
        torch.ops.precast.all_reduce(torch.zeros(4))


def test_operators_trace() -> None:
    """Schemas, mutation and fakes hold what they promise (torch.library.opcheck)."""
    ops = torch.ops.precast
    tests = ("test_schema", "test_faketensor")
    for fmt in Format:
        packed = pack(torch.randn(20, 8), fmt)
        arguments = (torch.randn(3, 8), packed, None, 20, int(fmt))
        torch.library.opcheck(ops.linear, arguments, test_utils=tests)
        ids = torch.tensor([3, 19])
        torch.library.opcheck(ops.embedding, (ids, packed, 8, int(fmt)), test_utils=tests)
    torch.library.opcheck(ops.paged_attention, tuple(attention_arguments()), test_utils=tests)
    torch.library.opcheck(ops.largest, (torch.randn(3, 70),), test_utils=tests)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("isa", OTHERS)
def test_other_instruction_sets(isa: str) -> None:
    """The same tests for the kernels that this CPU would not choose."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            *OWN_FILES.get(isa, FILES),
            "-p",
            "no:cacheprovider",
            *INNER,
        ],
        env={**os.environ, "PRECAST_NATIVE_ISA": isa, FEWER: "1"},
        capture_output=True,
        text=True,
        timeout=180,
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
