"""Kernel providers: every one gives the same results, and the choice among them has reasons."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from precast.errors import ConfigError
from precast.models.kv_cache import LayerCache, new_cache, read_cache
from precast.ops import providers
from precast.ops.native import ABI_VERSION
from precast.ops.packing import Format, pack
from precast.ops.providers import reference, sgl_kernel
from precast.ops.providers.base import Choice, Needs
from precast.system.cpu import Cpu, narrowed, parse_cpuinfo, this_cpu

UPSTREAM = Path(__file__).parents[1] / "support" / "upstream"
AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
SERVER = Cpu(model="with AMX", flags=AVX512 | {"amx_tile", "amx_int8", "amx_bf16"})
BF16 = Needs(weight_dtype="bf16", formats=frozenset({Format.BF16}), kv_dtype="bf16", head_dim=32)
BLOCK, BLOCKS = 16, 12


@pytest.fixture(autouse=True)
def native_again() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    providers.start(providers.select("native", BF16))


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(UPSTREAM)
    importlib.import_module("sgl_kernel")


def small_arguments(name: str) -> tuple[Tensor | float, ...]:
    return {
        "rms_norm": (torch.randn(5, 72), torch.randn(72), 1e-5),
        "rotary": (torch.randn(5, 3, 40), torch.rand(5, 20), torch.rand(5, 20)),
        "silu_and_mul": (torch.randn(5, 2 * 37) * 20,),
        "gelu_tanh_and_mul": (torch.randn(5, 2 * 37) * 20,),
        "sigmoid_and_mul": (torch.randn(5, 1) * 4, torch.randn(5, 37)),
        "soft_cap": (torch.randn(5, 37) * 20, 30.0),
        "route": (torch.randn(5, 11) * 3, 4, True),
    }[name]


SERVED_UPSTREAM = ["rms_norm", "rotary", "silu_and_mul"]
SMALL = [*SERVED_UPSTREAM, "gelu_tanh_and_mul", "sigmoid_and_mul", "soft_cap", "route"]


def paging(dim: int, heads: int = 6, kv_heads: int = 2) -> dict[str, Any]:
    """A prompt, a later chunk of one, two decodes, one of them in its first token, and padding."""
    new, contexts = [7, 5, 1, 1, 1], [7, 25, 33, 1, 0]
    tables = torch.randperm(BLOCKS)[: 4 * 3].view(4, 3)
    tables = torch.cat((tables, torch.zeros(1, 3))).to(torch.int32)
    slots = [
        int(tables[s, at // BLOCK]) * BLOCK + at % BLOCK if contexts[s] else -1
        for s, count in enumerate(new)
        for at in range(max(contexts[s], count) - count, max(contexts[s], count))
    ]
    tokens = sum(new)
    return {
        "q": torch.randn(tokens, heads, dim),
        "k": torch.randn(tokens, kv_heads, dim),
        "v": torch.randn(tokens, kv_heads, dim),
        "slots": torch.tensor(slots, dtype=torch.int32),
        "query_starts": torch.tensor([0, 7, 12, 13, 14, 15], dtype=torch.int32),
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "block_tables": tables,
    }


def full_cache(kv_dtype: str, dim: int, token_major: bool = False) -> LayerCache:
    """Every slot holds something, written by the provider in use."""
    cache = new_cache(
        kv_dtype,
        blocks=BLOCKS,
        kv_heads=2,
        block_size=BLOCK,
        head_dim=dim,
        token_major=token_major,
    )
    generator = torch.Generator().manual_seed(5)
    k, v = torch.randn(2, BLOCKS * BLOCK, 2, dim, generator=generator)
    none = torch.zeros(1, dtype=torch.int32)
    attend(
        cache,
        {
            "q": torch.zeros(len(k), 2, dim),
            "k": k,
            "v": v,
            "slots": torch.arange(len(k), dtype=torch.int32),
            "query_starts": torch.zeros(2, dtype=torch.int32),
            "context_lens": none,
            "block_tables": none[None],
        },
    )
    return cache


def attend(
    cache: LayerCache, given: dict[str, Any], window: int = 0, softcap: float = 0.0
) -> Tensor:
    q, k, v, *rest = given.values()
    out: Tensor = torch.ops.precast.paged_attention(
        q, k, v, cache.k, cache.v, *rest, q.shape[2] ** -0.5, window, softcap
    )
    return out


@pytest.mark.parametrize("name", SMALL)
def test_small_operators_agree_with_their_definition(name: str) -> None:
    arguments = small_arguments(name)
    native = getattr(torch.ops.precast, name)(*arguments)
    torch.testing.assert_close(native, getattr(reference, name)(*arguments), rtol=1e-5, atol=1e-5)


def test_small_operators_take_many_rows_and_strided_views() -> None:
    x = torch.randn(300, 3 * 96)
    q = x[:, :192].view(300, 2, 96)
    cos, sin = torch.rand(300, 24), torch.rand(300, 24)  # half of the features stay
    torch.testing.assert_close(
        torch.ops.precast.rotary(q, cos, sin), reference.rotary(q, cos, sin), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        torch.ops.precast.rms_norm(q, torch.ones(96), 1e-5),
        reference.rms_norm(q, torch.ones(96), 1e-5),
    )
    torch.testing.assert_close(torch.ops.precast.silu_and_mul(x), reference.silu_and_mul(x))


@pytest.mark.parametrize("fmt", list(Format))
def test_linear_agrees_with_the_reference(fmt: Format) -> None:
    weight, bias = pack(torch.randn(37, 100), fmt), torch.randn(37)
    for rows in (1, 5):
        x = torch.randn(rows, 100)
        native = torch.ops.precast.linear(x, weight, bias, 37, int(fmt))
        expected = reference.linear(x, weight, bias, 37, int(fmt))
        torch.testing.assert_close(native, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("fmt", list(Format))
def test_embedding_agrees_with_the_reference(fmt: Format) -> None:
    table, ids = pack(torch.randn(37, 100), fmt), torch.tensor([36, 0, 5, 5])
    native = torch.ops.precast.embedding(ids, table, 100, int(fmt))
    torch.testing.assert_close(native, reference.embedding(ids, table, 100, int(fmt)))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 3.0), (20, 2.0)])
def test_attention_agrees_with_the_reference(kv_dtype: str, window: int, softcap: float) -> None:
    given = paging(20)
    results, caches = [], []
    for name in ("native", "reference"):
        providers.start(providers.select(name, BF16))
        cache = full_cache(kv_dtype, 20)
        results.append(attend(cache, given, window, softcap))
        caches.append(cache)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(read_cache(caches[0]), read_cache(caches[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("provider", ["native", "reference"])
def test_operators_trace(provider: str) -> None:
    """Schemas, mutation, fakes and functionalisation (torch.library.opcheck)."""
    providers.start(providers.select(provider, BF16))
    ops = torch.ops.precast
    for name in SMALL:
        torch.library.opcheck(getattr(ops, name), small_arguments(name))
    for fmt in Format:
        packed = pack(torch.randn(20, 8), fmt)
        torch.library.opcheck(ops.linear, (torch.randn(3, 8), packed, None, 20, int(fmt)))
        torch.library.opcheck(ops.embedding, (torch.tensor([1, 19]), packed, 8, int(fmt)))
    given = paging(16)
    q, k, v, *rest = given.values()
    cache = full_cache("fp32", 16)
    torch.library.opcheck(ops.paged_attention, (q, k, v, *cache, *rest, 0.25, 0, 0.0))


def test_starting_another_provider_replaces_the_one_before() -> None:
    x = torch.randn(2, 8).double()  # ours take float32 alone, plain torch takes anything
    weight = torch.ones(8).double()
    providers.start(providers.select("reference", BF16))
    assert providers.active().provider == "reference"
    torch.ops.precast.rms_norm(x, weight, 1e-5)
    providers.start(providers.select("native", BF16))
    assert (providers.active().provider, providers.active().abi) == (
        "native",
        str(ABI_VERSION),
    )
    with pytest.raises(RuntimeError, match="must be float32"):
        torch.ops.precast.rms_norm(x, weight, 1e-5)


def test_an_unknown_provider_is_named() -> None:
    with pytest.raises(ConfigError, match="kernel_provider = onednn: not one of native, "):
        providers.select("onednn", BF16)


# ---- upstream's operators, by a stand-in


def reasons(needs: Needs, cpu: Cpu) -> dict[str, str]:
    choices = sgl_kernel.select(needs, cpu).choices
    assert all((choice.provider == "native") == bool(choice.reason) for choice in choices.values())
    return {name: choices[name].reason for name in sgl_kernel.USES}


def test_all_operators_are_served_where_everything_is_there(upstream: None) -> None:
    selection = sgl_kernel.select(BF16, SERVER)
    none = Choice(provider="native", reason="it has no such operator")
    assert {n for n, c in selection.choices.items() if c == none} == {
        "embedding",
        "fused_experts",
        "gelu_tanh_and_mul",
        "route",
        "sigmoid_and_mul",
        "soft_cap",
    }
    assert {c.provider for c in selection.choices.values() if c != none} == {"sgl_kernel"}
    assert selection.provider == "sgl_kernel"
    assert selection.abi.endswith(":linear+paged_attention+rms_norm+rotary+silu_and_mul")


def test_a_cpu_without_avx512_never_loads_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", pytest.fail)
    found = reasons(BF16, Cpu(model="old", flags=frozenset({"avx2"})))
    assert set(found.values()) == {"this CPU has no AVX-512"}
    assert sgl_kernel.select(BF16, Cpu(model="old", flags=frozenset())).provider == "native"


def test_without_amx_linears_are_native(upstream: None) -> None:
    found = reasons(BF16, Cpu(model="no tiles", flags=AVX512))
    assert found.pop("linear") == "this CPU has no AMX"
    assert set(found.values()) == {""}


def test_a_missing_library_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    assert all("sgl_kernel can't be loaded" in text for text in reasons(BF16, SERVER).values())


def test_another_schema_is_the_reason(upstream: None, monkeypatch: pytest.MonkeyPatch) -> None:
    schemas = {**sgl_kernel.SCHEMAS, "rmsnorm_cpu": "(Tensor input) -> Tensor"}
    monkeypatch.setattr(sgl_kernel, "SCHEMAS", schemas)
    found = reasons(BF16, SERVER)
    assert found.pop("rms_norm").startswith("rmsnorm_cpu has another schema: (Tensor input, Tensor")
    assert set(found.values()) == {""}


@pytest.mark.parametrize(
    ("changes", "operators", "reason"),
    [
        ({"kv_dtype": "int8"}, {"paged_attention"}, "kv_dtype is int8: it takes bf16"),
        ({"head_dim": 40}, {"paged_attention"}, "head_dim is 40"),
        ({"uneven_groups": True}, {"paged_attention"}, "this rank's KV heads have different"),
        ({"sinks": True}, {"paged_attention"}, "this model's attention has sinks"),
        ({"formats": frozenset({Format.Q4_0, Format.INT8})}, {"linear"}, "weights are q4_0"),
        (
            {"weight_dtype": "fp32"},
            {"linear", "rms_norm", "rotary", "silu_and_mul"},
            "weight_dtype is fp32: it takes bf16 and fp16",
        ),
    ],
)
def test_types_that_are_not_served(
    upstream: None, changes: dict[str, Any], operators: set[str], reason: str
) -> None:
    needs = {name: getattr(BF16, name) for name in BF16.__dataclass_fields__}
    found = reasons(Needs(**{**needs, **changes}), SERVER)
    assert {name for name in found if found[name]} == operators
    assert all(found[name].startswith(reason) for name in operators)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SERVED_UPSTREAM)
def test_upstream_small_operators_agree(upstream: None, name: str, dtype: str) -> None:
    arguments = small_arguments(name)
    kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    expected = getattr(reference, name)(*arguments)
    needs = Needs(weight_dtype=dtype, formats=frozenset(), kv_dtype="fp32", head_dim=40)
    providers.start(sgl_kernel.select(needs, SERVER))
    actual = getattr(torch.ops.precast, name)(*arguments)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    # Upstream's rotary writes into its arguments: ours must be as they were.
    assert all(
        torch.equal(a, b)
        for a, b in zip(arguments, kept, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


@pytest.mark.parametrize("fmt", [Format.BF16, Format.FP16, Format.INT8])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (37, 100), (1, 1)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_upstream_linears_agree(
    upstream: None, fmt: Format, n: int, k: int, with_bias: bool
) -> None:
    """Any shape: upstream's come in tiles of 16 by 32."""
    weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n) if with_bias else None
    x = torch.randn(3, k)
    expected = torch.nn.functional.linear(x, weight, bias)
    needs = Needs(weight_dtype="bf16", formats=frozenset({fmt}), kv_dtype="fp32", head_dim=32)
    selection = sgl_kernel.select(needs, SERVER)
    providers.start(selection)
    assert selection.pack is not None
    packed = selection.pack(weight, fmt)
    assert packed.dtype == torch.uint8
    actual = torch.ops.precast.linear(x, packed, bias, n, int(fmt))
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (0, 3.0)])
def test_upstream_attention_agrees(upstream: None, amx: bool, window: int, softcap: float) -> None:
    """With AMX prompts go through the extend kernel, without token by token through decode."""
    given = paging(32)
    expected_cache = full_cache("bf16", 32)
    expected = attend(expected_cache, given, window, softcap)
    providers.start(sgl_kernel.select(BF16, SERVER if amx else Cpu(model="no tiles", flags=AVX512)))
    cache = full_cache("bf16", 32, token_major=True)
    actual = attend(cache, given, window, softcap)
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
    for ours, theirs in zip(read_cache(cache), read_cache(expected_cache), strict=True):
        assert torch.equal(ours, theirs)


def test_upstream_attention_refuses_a_cache_of_our_layout(upstream: None) -> None:
    cache = full_cache("bf16", 32)
    providers.start(sgl_kernel.select(BF16, SERVER))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        attend(cache, paging(32))


def test_operators_trace_with_upstream(upstream: None) -> None:
    selection = sgl_kernel.select(BF16, SERVER)
    providers.start(selection)
    assert selection.pack is not None
    ops = torch.ops.precast
    for name in SMALL:
        torch.library.opcheck(getattr(ops, name), small_arguments(name))
    packed = selection.pack(torch.randn(20, 8), Format.BF16)
    torch.library.opcheck(ops.linear, (torch.randn(3, 8), packed, None, 20, int(Format.BF16)))
    q, k, v, *rest = paging(32).values()
    cache = full_cache("bf16", 32, token_major=True)
    torch.library.opcheck(ops.paged_attention, (q, k, v, *cache, *rest, 0.25, 0, 0.0))


def test_cpuinfo_is_read() -> None:
    text = "processor: 0\nmodel name: Some CPU\nflags: fpu amx_tile avx512f\n\nprocessor: 1\n"
    cpu = parse_cpuinfo(text)
    assert (cpu.model, cpu.flags) == ("Some CPU", {"fpu", "amx_tile", "avx512f"})
    assert not cpu.amx
    assert not cpu.avx512
    assert this_cpu().flags


@pytest.mark.parametrize(
    ("isa", "left"),
    [
        ("", AVX512 | {"avx2", "amx_tile", "fma"}),
        ("amx", AVX512 | {"avx2", "amx_tile", "fma"}),
        ("avx512", AVX512 | {"avx2", "fma"}),
        ("avx2", {"avx2", "fma"}),
        ("scalar", set()),
    ],
)
def test_a_lesser_instruction_set_hides_what_goes_beyond(isa: str, left: set[str]) -> None:
    whole = Cpu(model="any", flags=AVX512 | {"avx2", "amx_tile", "fma"})
    assert narrowed(whole, isa) == Cpu(model="any", flags=frozenset(left))
