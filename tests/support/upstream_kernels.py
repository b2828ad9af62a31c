"""Upstream's CPU kernels for tests: a stand-in, or the real ones where those are installed."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import torch

from precast.ops.packing import Format
from precast.ops.providers.base import Needs
from precast.system.cpu import Cpu, this_cpu

FOLDER: Final = Path(__file__).parent / "upstream"
INSTALLED: Final = importlib.util.find_spec("sgl_kernel") is not None
"""Upstream's own: its operators are tested then, on this CPU, in place of the stand-in's."""
AVX2: Final = frozenset({"avx2", "fma", "f16c"})
AVX512: Final = AVX2 | {
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "avx512_vnni",
}
AMX: Final = frozenset({"amx_tile", "amx_int8", "amx_bf16", "amx_fp16"})
SERVER: Final = Cpu(model="with AMX", flags=AVX512 | AMX)
RUNS: Final = this_cpu() if INSTALLED else SERVER
"""Whose kernels are called."""
BF16: Final = Needs(
    weight_dtype="bf16", formats=frozenset({Format.BF16}), kv_dtype="bf16", head_dim=32, experts=8
)


@contextmanager
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``sgl_kernel`` can be imported."""
    if not INSTALLED:
        monkeypatch.syspath_prepend(FOLDER)
    importlib.import_module("sgl_kernel")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the stand-in's tensors are tiny
    yield
    torch.set_num_threads(threads)
