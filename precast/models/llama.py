"""Llama (2 and 3, SmolLM2, and what else shares the architecture), for one rank.

A step is ``embed``, then ``layer`` once for each layer, then ``head``: pure functions of tensors
and of a ``LlamaShape``. They run as they stand (prefill, and decode where no graph is there yet)
and are what is captured. Weights are arguments, so a captured graph holds none.

T: tokens in the step. S: sequences. H: hidden size. D: head size. Hidden states are float32.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from precast.models.config import ModelConfig
from precast.models.kv_cache import LayerCache
from precast.models.precision import Precision
from precast.models.sharding import Shard
from precast.ops.packing import Format


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Everything static that a graph depends on. Head, MLP and vocabulary sizes are this rank's."""

    hidden_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_widths: tuple[int, ...]
    """Vocabulary rows of each rank; one entry without tensor parallelism."""
    vocab_size: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    weight_dtype: str
    quantization: str
    """Format of the layers' linears; "none": ``weight_dtype``."""
    head_quantization: str
    """Format of the output projection, likewise."""
    kv_dtype: str

    @property
    def tp_size(self) -> int:
        return len(self.vocab_widths)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded to less than float32 between a step's operators."""
        return (
            self.linear_format <= Format.FP16
            and self.head_format <= Format.FP16
            and (self.kv_dtype == "fp32")
        )

    @property
    def linear_format(self) -> Format:
        return self._format(self.quantization)

    @property
    def head_format(self) -> Format:
        return self._format(self.head_quantization)

    def _format(self, quantization: str) -> Format:
        return Format[(self.weight_dtype if quantization == "none" else quantization).upper()]


def shape_of(config: ModelConfig, shard: Shard, precision: Precision) -> LlamaShape:
    return LlamaShape(
        hidden_size=config.hidden_size,
        q_heads=len(shard.q_heads),
        kv_heads=len(shard.kv_heads),
        head_dim=config.head_dim,
        intermediate_size=len(shard.mlp),
        vocab_widths=shard.vocab_widths,
        vocab_size=len(shard.vocab),
        rms_norm_eps=config.rms_norm_eps,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        **asdict(precision),
    )


Linear = list[Tensor]
"""A packed linear's tensors: its weight, and its bias if it has one."""


class EmbedWeights(NamedTuple):
    table: Tensor
    """[vocabulary, H]; whole on every rank."""
    cos: Tensor
    """float32 [positions, D / 2]"""
    sin: Tensor


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class HeadWeights(NamedTuple):
    norm: Tensor
    vocab: Linear


class Paging(NamedTuple):
    """Where a step's tokens live in the paged KV cache; all int32."""

    slots: Tensor
    """[T] flat slot of each new token; -1 for a row that only pads the batch."""
    query_starts: Tensor
    """[S + 1] prefix sums of each sequence's new tokens."""
    context_lens: Tensor
    """[S] tokens in the cache once this step's are written; 0 for padding."""
    block_tables: Tensor
    """[S, blocks]"""


def embed(token_ids: Tensor, positions: Tensor, weights: EmbedWeights) -> tuple[Tensor, ...]:
    """int64 [T] ids and positions to hidden states [T, H] and rotary cos and sin [T, D / 2]."""
    hidden = torch.nn.functional.embedding(token_ids, weights.table).float()
    return hidden, weights.cos[positions], weights.sin[positions]


def layer(
    shape: LlamaShape,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    paging: Paging,
    cache: LayerCache,
    weights: LayerWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]; writes this step's keys and values."""
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    hidden = hidden + attention(shape, normed, cos, sin, paging, cache, weights)
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    return hidden + mlp(shape, normed, weights)


def head(shape: LlamaShape, hidden: Tensor, weights: HeadWeights) -> Tensor:
    """Hidden states [T, H] to logits [T, vocabulary of all ranks]."""
    normed = rms_norm(hidden, weights.norm, shape.rms_norm_eps)
    logits = linear(shape.head_format, normed, weights.vocab, shape.vocab_size, False)
    if shape.tp_size == 1:
        return logits
    gathered: Tensor = torch.ops.precast.all_gather(logits, list(shape.vocab_widths))
    return gathered


def attention(
    shape: LlamaShape,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    paging: Paging,
    cache: LayerCache,
    weights: LayerWeights,
) -> Tensor:
    if shape.q_heads == 0:  # more ranks than query heads
        return reduce(shape, x.new_zeros(x.shape[0], shape.hidden_size))
    q_size, kv_size = shape.q_heads * shape.head_dim, shape.kv_heads * shape.head_dim
    qkv = linear(shape.linear_format, x, weights.qkv, q_size + 2 * kv_size, shape.attention_bias)
    q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
    out = torch.ops.precast.paged_attention(
        rotate(q.view(-1, shape.q_heads, shape.head_dim), cos, sin),
        rotate(k.view(-1, shape.kv_heads, shape.head_dim), cos, sin),
        v.view(-1, shape.kv_heads, shape.head_dim),
        cache.k,
        cache.v,
        *paging,
        shape.head_dim**-0.5,
        0,
        0.0,
    )
    out = out.view(-1, q_size)
    return reduce(
        shape,
        linear(shape.linear_format, out, weights.output, shape.hidden_size, shape.attention_bias),
    )


def mlp(shape: LlamaShape, x: Tensor, weights: LayerWeights) -> Tensor:
    gate_up = linear(
        shape.linear_format, x, weights.gate_up, 2 * shape.intermediate_size, shape.mlp_bias
    )
    gate, up = gate_up.chunk(2, dim=-1)
    x = torch.nn.functional.silu(gate) * up
    return reduce(
        shape, linear(shape.linear_format, x, weights.down, shape.hidden_size, shape.mlp_bias)
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [T, heads, D], pairs (i, i + D / 2) as Hugging Face lays them out."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def linear(fmt: Format, x: Tensor, weights: Linear, out_features: int, bias: bool) -> Tensor:
    """[T, K] to [T, out_features] through the kernel for the weights' format."""
    added = weights[1] if bias else None
    y: Tensor = torch.ops.precast.linear(x, weights[0], added, out_features, int(fmt))
    return y


def reduce(shape: LlamaShape, partial: Tensor) -> Tensor:
    """Sum of the ranks' partial results."""
    if shape.tp_size == 1:
        return partial
    total: Tensor = torch.ops.precast.all_reduce(partial)
    return total
