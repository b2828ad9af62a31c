"""Kernel providers: every one gives the same results, and the choice among them has reasons."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from precast.errors import ConfigError
from precast.models.kv_cache import LayerCache, new_cache, read_cache
from precast.ops import native, providers
from precast.ops.native import ABI_VERSION
from precast.ops.packing import Format, pack
from precast.ops.providers import reference, sgl_kernel, sgl_trial
from precast.ops.providers.base import Choice, Needs
from precast.system.cpu import Cpu, narrowed, parse_cpuinfo, this_cpu
from tests.support.upstream_kernels import AMX, AVX2, AVX512, BF16, FOLDER, RUNS, SERVER, loaded

BLOCK, BLOCKS = 16, 12


@pytest.fixture(autouse=True)
def native_again() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    providers.start(providers.select("native", BF16))


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with loaded(monkeypatch):
        yield


def small_arguments(name: str) -> tuple[Tensor | float, ...]:
    arguments: dict[str, tuple[Tensor | float, ...]] = {
        "rms_norm": (torch.randn(5, 72), torch.randn(72), 1e-5),
        "rotary": (torch.randn(5, 3, 40), torch.rand(5, 20), torch.rand(5, 20)),
        "silu_and_mul": (torch.randn(5, 2 * 37) * 20,),
        "gelu_tanh_and_mul": (torch.randn(5, 2 * 37) * 20,),
        "sigmoid_and_mul": (torch.randn(5, 1) * 4, torch.randn(5, 37)),
        "soft_cap": (torch.randn(5, 37) * 20, 30.0),
        "route": (torch.randn(5, 11) * 3, 4, True),
    }
    return arguments[name]


SERVED_UPSTREAM = ["rms_norm", "rotary", "silu_and_mul", "gelu_tanh_and_mul"]
PRODUCTS = ("fused_experts", "linear")
SMALL = [*SERVED_UPSTREAM, "sigmoid_and_mul", "soft_cap", "route"]


def short_paging(dim: int) -> dict[str, Any]:
    """A prompt, a later chunk of one, two decodes, one of them in its first token, and padding."""
    tables = torch.randperm(BLOCKS)[: 4 * 3].view(4, 3)
    return paging(dim, [7, 5, 1, 1, 1], [7, 25, 33, 1, 0], torch.cat((tables, torch.zeros(1, 3))))


def long_paging(dim: int) -> dict[str, Any]:
    """A chunk of several of upstream's blocks, and a decode."""
    tables = torch.cat((torch.randperm(BLOCKS - 2), torch.tensor([BLOCKS - 2]).repeat(BLOCKS - 2)))
    return paging(dim, [80, 1], [100, 9], tables.view(2, -1))


def paging(dim: int, new: list[int], contexts: list[int], tables: Tensor) -> dict[str, Any]:
    """Arguments of attention for sequences of ``new`` tokens at the ends of their contexts."""
    heads, kv_heads, tables = 6, 2, tables.to(torch.int32)
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
        "query_starts": torch.tensor([0, *new]).cumsum(0).to(torch.int32),
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
    cache: LayerCache,
    given: dict[str, Any],
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    q, k, v, *rest = given.values()
    out: Tensor = torch.ops.precast.paged_attention(
        q, k, v, cache.k, cache.v, *rest, q.shape[2] ** -0.5, window, softcap, [], sinks
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
    given = short_paging(20)
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
    given = short_paging(16)
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
        "sigmoid_and_mul",
        "soft_cap",
    }
    assert {c.provider for c in selection.choices.values() if c != none} == {"sgl_kernel"}
    assert selection.provider == "sgl_kernel"
    _, names, version = selection.abi.split(":")
    assert names == "+".join(sorted(sgl_kernel.USES))
    assert version == f"{sys.modules['sgl_kernel'].__version__}-2"  # what pack makes


def test_a_cpu_without_avx2_never_loads_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", pytest.fail)
    found = reasons(BF16, Cpu(model="old", flags=frozenset({"avx2", "fma"})))
    assert set(found.values()) == {"this CPU has no f16c"}
    assert sgl_kernel.select(BF16, Cpu(model="old", flags=frozenset())).provider == "native"


HALF_A_LIBRARY = """
exec(open({stand_in!r}).read())
import os, signal

def replace(name, function):
    _library.impl(name, function, "CPU", allow_override=True)

def raises(x):
    raise RuntimeError("not compiled")

replace("rmsnorm_cpu", lambda x, weight, eps: torch.zeros_like(x))
replace("gelu_tanh_and_mul_cpu", raises)
replace("rotary_embedding_cpu", lambda *_: os.kill(os.getpid(), signal.SIGILL))
"""


def test_a_library_is_tried_by_another_process_where_it_may_not_run(
    upstream: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Operators that are wrong, left out or beyond the CPU are native, each with its reason."""
    (tmp_path / "sgl_kernel.py").write_text(
        HALF_A_LIBRARY.format(stand_in=str(FOLDER / "sgl_kernel" / "__init__.py"))
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    sgl_trial.failures.cache_clear()
    found = reasons(BF16, Cpu(model="no AVX-512", flags=AVX2))
    sgl_trial.failures.cache_clear()
    trial = "a trial of sgl_kernel"
    assert found == {
        "silu_and_mul": "",
        "rms_norm": f"{trial} gave a wrong result",
        "gelu_tanh_and_mul": f"{trial} failed: not compiled",
        "rotary": f"{trial} ended with SIGILL: it is built for another CPU",
        "paged_attention": f"{trial} ended with SIGILL: it is built for another CPU",
        "route": f"{trial} ended with SIGILL: it is built for another CPU",
        "fused_experts": "this CPU has no AMX",
        "linear": "this CPU has no AMX",
    }


def test_without_amx_linears_and_experts_are_native(upstream: None) -> None:
    found = reasons(BF16, Cpu(model="no tiles", flags=AVX512))
    for name in PRODUCTS:
        assert found.pop(name) == "this CPU has no AMX"
    assert set(found.values()) == {""}


def test_a_missing_library_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    assert set(reasons(BF16, SERVER).values()) == {"sgl_kernel is not installed"}


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
        ({"formats": frozenset({Format.Q4_0, Format.INT8})}, {*PRODUCTS}, "weights are q4_0"),
        (
            {"weight_dtype": "fp32"},
            {"route", *PRODUCTS, *SERVED_UPSTREAM},
            "weight_dtype is fp32: it takes bf16 and fp16",
        ),
        ({"experts": 0}, {"fused_experts", "route"}, "the model has no experts"),
        ({"experts": 60}, {"route"}, "it routes to no 60 experts"),
        ({"limited_experts": True}, {"fused_experts"}, "experts have biases and a limit"),
    ],
)
def test_types_that_are_not_served(
    upstream: None, changes: dict[str, Any], operators: set[str], reason: str
) -> None:
    found = reasons(replace(BF16, **changes), SERVER)
    assert {name for name in found if found[name]} == operators
    assert all(found[name].startswith(reason) for name in operators)


def test_linears_in_fp16_need_amx_that_has_it(upstream: None) -> None:
    """Elsewhere upstream's give wrong results, without a word."""
    older = Cpu(model="AMX of bf16 and int8", flags=SERVER.flags - {"amx_fp16"})
    by_weights = replace(BF16, weight_dtype="fp16", formats=frozenset({Format.INT8}))
    by_format = replace(BF16, formats=frozenset({Format.FP16}))
    for needs in (by_weights, by_format):
        found = reasons(needs, older)
        for name in PRODUCTS:
            assert found.pop(name).startswith("weights are fp16")
        assert set(found.values()) == {""}
        newer = Cpu(model="AMX of fp16 too", flags=SERVER.flags | AMX)
        assert set(reasons(needs, newer).values()) == {""}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SERVED_UPSTREAM)
def test_upstream_small_operators_agree(upstream: None, name: str, dtype: str) -> None:
    arguments = small_arguments(name)
    kept = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    expected = getattr(reference, name)(*arguments)
    needs = Needs(weight_dtype=dtype, formats=frozenset(), kv_dtype="fp32", head_dim=40)
    providers.start(sgl_kernel.select(needs, RUNS))
    actual = getattr(torch.ops.precast, name)(*arguments)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    # Upstream's rotary writes into its arguments: ours must be as they were.
    assert all(
        torch.equal(a, b)
        for a, b in zip(arguments, kept, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )


def test_upstream_takes_no_rows(upstream: None) -> None:
    """As in a step that draws no token."""
    providers.start(sgl_kernel.select(BF16, RUNS))
    for name in SERVED_UPSTREAM:
        first, *rest = small_arguments(name)
        assert isinstance(first, Tensor)
        others = [a[:0] if isinstance(a, Tensor) and a.dim() == 2 else a for a in rest]
        empty = getattr(torch.ops.precast, name)(first[:0], *others)
        assert empty.shape == (0, *getattr(reference, name)(first, *rest).shape[1:])
    given = paging(32, [0], [0], torch.zeros(1, 1))
    assert attend(full_cache("bf16", 32, token_major=True), given).shape == (0, 6, 32)


@pytest.mark.parametrize("fmt", [Format.BF16, Format.FP16, Format.INT8])
@pytest.mark.parametrize(("n", "k"), [(32, 64), (37, 100), (1, 1)])
@pytest.mark.parametrize(("rows", "with_bias"), [(0, False), (3, False), (3, True), (40, True)])
def test_upstream_linears_agree(
    upstream: None, fmt: Format, n: int, k: int, rows: int, with_bias: bool
) -> None:
    """Any shape: upstream's come in tiles. It has a kernel for up to 4 rows and one for more."""
    weight, bias = torch.randn(n, k) / k**0.5, torch.randn(n) if with_bias else None
    x = torch.randn(rows, k)
    expected = torch.nn.functional.linear(x, weight, bias)
    needs = Needs(weight_dtype="bf16", formats=frozenset({fmt}), kv_dtype="fp32", head_dim=32)
    selection = sgl_kernel.select(needs, RUNS)
    providers.start(selection)
    if selection.pack is None:
        pytest.skip(selection.choices["linear"].reason)  # upstream's own on this CPU
    packed = selection.pack(weight, fmt)
    assert packed.dtype == torch.uint8
    actual = torch.ops.precast.linear(x, packed, bias, n, int(fmt))
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)


SHORT = [(0, 0.0, False), (1, 0.0, False), (5, 0.0, True), (0, 3.0, False), (0, 0.0, True)]
"""Window, cap and whether there are sinks."""


@pytest.mark.parametrize(
    ("amx", "paged", "window", "softcap", "with_sinks"),
    [
        *((amx, short_paging, *options) for amx in (False, True) for options in SHORT),
        (False, long_paging, 5, 0.0, False),
        (True, long_paging, 0, 0.0, True),
        (True, long_paging, 5, 0.0, False),
        (True, long_paging, 0, 3.0, False),
    ],
)
def test_upstream_attention_agrees(
    upstream: None,
    amx: bool,
    paged: Callable[[int], dict[str, Any]],
    window: int,
    softcap: float,
    with_sinks: bool,
) -> None:
    """With AMX prompts go through the extend kernel, without token by token through decode."""
    given = paged(32)
    sinks = torch.randn(given["q"].shape[1]) if with_sinks else None
    expected_cache = full_cache("bf16", 32)
    expected = attend(expected_cache, given, window, softcap, sinks)
    cpu = RUNS if amx else Cpu(model="no tiles", flags=RUNS.flags - AMX)
    providers.start(sgl_kernel.select(BF16, cpu))
    cache = full_cache("bf16", 32, token_major=True)
    actual = attend(cache, given, window, softcap, sinks)
    torch.testing.assert_close(actual, expected, rtol=3e-2, atol=3e-2)
    for ours, theirs in zip(read_cache(cache), read_cache(expected_cache), strict=True):
        assert torch.equal(ours, theirs)


def test_upstream_attention_refuses_a_cache_of_our_layout(upstream: None) -> None:
    cache = full_cache("bf16", 32)
    providers.start(sgl_kernel.select(BF16, RUNS))
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        attend(cache, short_paging(32))


def test_operators_trace_with_upstream(upstream: None) -> None:
    selection = sgl_kernel.select(BF16, RUNS)
    providers.start(selection)
    ops = torch.ops.precast
    for name in SERVED_UPSTREAM:
        torch.library.opcheck(getattr(ops, name), small_arguments(name))
    packed = (selection.pack or pack)(torch.randn(20, 8), Format.BF16)
    torch.library.opcheck(ops.linear, (torch.randn(3, 8), packed, None, 20, int(Format.BF16)))
    q, k, v, *rest = short_paging(32).values()
    cache = full_cache("bf16", 32, token_major=True)
    torch.library.opcheck(ops.paged_attention, (q, k, v, *cache, *rest, 0.25, 0, 0.0))


def test_upstream_runs_on_as_many_threads_as_our_own_kernels(upstream: None) -> None:
    before, mask = torch.get_num_threads(), os.sched_getaffinity(0)
    cores = native.thread_cores()
    native.start_threads((-1, -1, -1))
    try:
        providers.start(sgl_kernel.select(BF16, RUNS))
        assert torch.get_num_threads() == 3
        assert os.sched_getaffinity(0) == mask
        providers.start(providers.select("native", BF16))
        assert torch.get_num_threads() == 1
    finally:
        native.start_threads(cores)
        torch.set_num_threads(before)


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
        ("", AVX512 | {"amx_tile", "avx_vnni"}),
        ("amx", AVX512 | {"amx_tile", "avx_vnni"}),
        ("avx512", AVX512 | {"avx_vnni"}),
        ("avxvnni", AVX2 | {"avx_vnni"}),
        ("avx2", AVX2),
        ("scalar", set()),
    ],
)
def test_a_lesser_instruction_set_hides_what_goes_beyond(isa: str, left: set[str]) -> None:
    whole = Cpu(model="any", flags=AVX512 | {"amx_tile", "avx_vnni"})
    assert narrowed(whole, isa) == Cpu(model="any", flags=frozenset(left))
