"""Registers ``torch.ops.precast.*``: the native library's kernels and their fakes.

The fakes give shapes and dtypes alone, so that ``torch.export`` and ``torch.compile`` can trace
through the operators. Importing this module loads the library; nothing is compiled here.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from precast.errors import ConfigError
from precast.system import numa

LIBRARY = Path(__file__).parent / "_native.so"
ABI_VERSION = 7
"""Raised whenever a schema or a packed format changes: graphs captured before must not be used."""
PACKING_VERSION = 4
MAX_QUERY_GROUP = 64
"""Query heads to a KV head, at the most (``csrc/kernels.h``)."""


def _load() -> None:
    if not LIBRARY.exists():
        raise ConfigError(f"native kernels are not built ({LIBRARY} is missing): run `make native`")
    # Global, because captured graphs resolve their entry points against it (ends of ``*ops.cpp``).
    ctypes.CDLL(str(LIBRARY), mode=ctypes.RTLD_GLOBAL)
    torch.ops.load_library(str(LIBRARY))


_load()


@torch.library.register_fake("precast::linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, fmt: int) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def has_adapters() -> bool:
    """Whether the library has the operator that adds them: one that was built before it serves all
    the rest."""
    return hasattr(torch.ops.precast, "adapted_linear")


if has_adapters():

    @torch.library.register_fake("precast::adapted_linear")
    def _adapted_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        slots: Tensor,
        a: Tensor,
        b: Tensor,
        widths: Sequence[int],
        fmt: int,
    ) -> Tensor:
        return x.new_empty((x.shape[0], sum(widths)))


@torch.library.register_fake("precast::embedding")
def _embedding(ids: Tensor, weight: Tensor, features: int, fmt: int) -> Tensor:
    return ids.new_empty((ids.shape[0], features), dtype=torch.float32)


@torch.library.register_fake("precast::paged_attention")
def _paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int,
    softcap: float,
    groups: Sequence[int] = (),
    sinks: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("precast::rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("precast::rotary")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("precast::silu_and_mul")
def _silu_and_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.register_fake("precast::gelu_tanh_and_mul")
def _gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.register_fake("precast::sigmoid_and_mul")
def _sigmoid_and_mul(gate: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("precast::soft_cap")
def _soft_cap(x: Tensor, cap: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("precast::route")
def _route(scores: Tensor, per_token: int, normalize: bool) -> tuple[Tensor, Tensor]:
    shape = (scores.shape[0], per_token)
    return scores.new_empty(shape, dtype=torch.int64), scores.new_empty(shape)


@torch.library.register_fake("precast::largest")
def _largest(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:1]), x.new_empty(x.shape[:1], dtype=torch.int64)


Drawings = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.register_fake("precast::sample")
def _sample(
    logits: Tensor,
    reals: Tensor,
    ints: Tensor,
    seen_starts: Tensor | None,
    seen_ids: Tensor | None,
    seen_counts: Tensor | None,
    bias_starts: Tensor | None,
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    masks: Tensor | None,
    mask_rows: Tensor | None,
    top: int,
) -> Drawings:
    return _drawings(logits, ints, top)


@torch.library.register_fake("precast::sample_split")
def _sample_split(
    logits: Tensor, reals: Tensor, ints: Tensor, *others: Tensor | Sequence[int] | int | None
) -> Drawings:
    top = others[-2]
    assert isinstance(top, int)
    return _drawings(logits, ints, top)


def _drawings(logits: Tensor, ints: Tensor, top: int) -> Drawings:
    rows = logits.shape[0]
    return (
        ints.new_empty((rows,)),
        ints.new_empty((rows,), dtype=torch.int32),
        logits.new_empty((rows,)),
        ints.new_empty((rows, top), dtype=torch.int32),
        logits.new_empty((rows, top)),
    )


@torch.library.register_fake("precast::fused_experts")
def _fused_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_size: int,
    fmt: int,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    limit: float = 0.0,
) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("precast::all_reduce")
def _all_reduce(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("precast::all_gather")
def _all_gather(x: Tensor, widths: list[int]) -> Tensor:
    return x.new_empty((x.shape[0], sum(widths)))


@torch.library.register_fake("precast::broadcast")
def _broadcast(x: Tensor, root: int) -> Tensor:
    return x.new_empty(x.shape)


_cores: tuple[int, ...] = (-1,)


def thread_cores() -> tuple[int, ...]:
    """For each compute thread, the CPU that it is pinned to, or -1."""
    return _cores


def start_threads(cores: tuple[int, ...], near: tuple[int, ...] = ()) -> None:
    """One compute thread on each core, anywhere for -1; the caller is the first. Replaces torch's
    own threads. Weights and caches that are allocated from now on lie ``near`` these cores, or
    those of the threads."""
    global _cores
    _cores = cores
    numa.set_home(near or cores)
    torch.set_num_threads(1)
    torch.ops.precast.start_threads(list(cores))


def join_group(name: str, rank: int, size: int, timeout_s: float) -> None:
    """Joins the shared-memory group that the collectives use; leaves the one before. Raises
    RuntimeError."""
    torch.ops.precast.join_group(name, rank, size, timeout_s)


def native_isa() -> str:
    """The instruction set that the kernels run with: scalar, avx2, avxvnni, avx512 or amx."""
    isa: str = torch.ops.precast.native_isa()
    return isa
