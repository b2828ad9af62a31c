"""A layer's paged KV cache, as ``paged_attention`` reads and writes it.

Keys lie transposed within their block: a vector holds one feature of neighbouring keys, so scores
need no horizontal sums. int8 keys and values carry a float32 scale each, in four bytes behind their
features.
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from precast.system.memory import mapped_zeros

KV_DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
SCALE_BYTES: Final = 4
Memory = Callable[[int], Tensor]
"""At least so many bytes, as uint8."""


class LayerCache(NamedTuple):
    """Written in place. E is 4 for int8 and 0 otherwise; D is the head size."""

    k: Tensor
    """[blocks, kv_heads, D + E, block_size]"""
    v: Tensor
    """[blocks, kv_heads, block_size, D + E]"""


def new_cache(
    kv_dtype: str,
    *,
    blocks: int,
    kv_heads: int,
    block_size: int,
    head_dim: int,
    token_major: bool = False,
    memory: Memory = mapped_zeros,
) -> LayerCache:
    """A cache near the compute threads. It is mapped lazily: a page costs memory when it is first
    written.

    ``token_major``: the same shapes over memory in which a token's heads lie side by side, for
    kernel providers that want it. ``memory``: where it lies, and what is in it.
    """
    dtype = KV_DTYPES[kv_dtype]
    width = head_dim + (SCALE_BYTES if dtype == torch.int8 else 0)
    if token_major:
        k, v = (_mapped(memory, (blocks, block_size, kv_heads, width), dtype) for _ in "kv")
        return LayerCache(k.permute(0, 2, 3, 1), v.transpose(1, 2))
    return LayerCache(
        _mapped(memory, (blocks, kv_heads, width, block_size), dtype),
        _mapped(memory, (blocks, kv_heads, block_size, width), dtype),
    )


def _mapped(memory: Memory, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return memory(size)[:size].view(dtype).view(shape)


def fill_cache(cache: LayerCache, k: Tensor, v: Tensor) -> None:
    """Writes float32 keys and values [blocks * block_size, kv_heads, D] to all slots in order."""
    tokens = k.shape[0]
    slots = torch.arange(tokens, dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    starts, table = torch.tensor([0, 0], dtype=torch.int32), torch.zeros((1, 1), dtype=torch.int32)
    torch.ops.precast.paged_attention(k, k, v, *cache, slots, starts, none, table, 1.0, 0, 0.0)


def read_cache(cache: LayerCache) -> LayerCache:
    """The same keys and values as float32, k [blocks, kv_heads, block_size, D] and v likewise."""
    k, v = cache.k.transpose(2, 3), cache.v
    if cache.k.dtype != torch.int8:
        return LayerCache(k.float(), v.float())
    dim = v.shape[3] - SCALE_BYTES
    k_scales = cache.k[:, :, dim:].contiguous().view(*v.shape[:2], -1).view(torch.float32)
    v_scales = v[..., dim:].contiguous().view(torch.float32)
    return LayerCache(k[..., :dim].float() * k_scales[..., None], v[..., :dim].float() * v_scales)
