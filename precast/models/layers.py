"""What architectures are built of: pure functions of tensors and of a ``ModelShape``.

A step is ``embed``, then ``layer`` once for each layer, then ``head``. Each architecture's module
puts these together out of the blocks here. They run as they stand (prefill, and decode where no
graph is there yet) and are what is captured. Weights are arguments, so a captured graph holds none.

What rounds more than once is an operator: a graph's compiler rounds torch's own functions in an
order of its own, and a token's logits are the same bits eagerly and in every graph.

T: tokens in the step. S: sequences. H: hidden size. D: head size. Hidden states are float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.options import ExpertOptions
from precast.models.shape import ModelShape
from precast.ops.packing import Format

Shape = ModelShape[Any]
Linear = list[Tensor]
"""A packed linear's tensors: its weight, its bias if it has one, and each row's slot and all slots'
A and B if there are adapters (``weights/adapters.py``)."""
Activation = Callable[[Tensor], Tensor]
"""Of gate and up side by side, [T, 2 N], to activation(gate) * up."""


class EmbedWeights(NamedTuple):
    table: Tensor
    """[vocabulary, H], packed as the head is; whole on every rank."""
    ropes: list[Tensor]
    """Cosines and sines of each rope, one after the other; float32 [positions, rotated / 2]."""


class AttentionWeights(NamedTuple):
    qkv: Linear
    output: Linear
    qk_norms: list[Tensor]
    """[D] each, of queries and of keys, or of all heads together; empty where they are not
    normed."""
    sinks: tuple[Tensor, ...] = ()
    """[query heads]: scores that take part in a head's softmax and add nothing; empty: none."""


class MlpWeights(NamedTuple):
    gate_up: Linear
    down: Linear


class ExpertWeights(NamedTuple):
    router: Linear
    """Not quantised: its values decide which experts run."""
    gate_up: Tensor
    """uint8 [experts, panels, bytes]: each expert's packed linear."""
    down: Tensor
    biases: tuple[Tensor, ...] = ()
    """float32 [experts, outputs] of both; empty: none."""


class DecoderWeights(NamedTuple):
    """Of a layer that norms what goes into attention and into its MLP, and nothing else."""

    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights


class ExpertDecoderWeights(NamedTuple):
    """``DecoderWeights`` with experts in place of the MLP."""

    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: ExpertWeights


class PostNormWeights(NamedTuple):
    """Of a layer that norms what comes out of attention and out of its MLP, and nothing else."""

    attention: AttentionWeights
    attention_out_norm: Tensor
    mlp: MlpWeights
    mlp_out_norm: Tensor


class HeadWeights(NamedTuple):
    norm: Tensor
    vocab: Linear


class Rope(NamedTuple):
    """Of a step's tokens; [T, rotated / 2]."""

    cos: Tensor
    sin: Tensor


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


def embed(
    shape: Shape, token_ids: Tensor, positions: Tensor, weights: EmbedWeights
) -> tuple[Tensor, ...]:
    """int64 [T] ids and positions to hidden states [T, H] and each rope's cos and sin."""
    hidden = torch.ops.precast.embedding(
        token_ids, weights.table, shape.hidden_size, int(shape.head_format)
    )
    return hidden, *(table[positions] for table in weights.ropes)


def head(shape: Shape, hidden: Tensor, weights: HeadWeights) -> Tensor:
    """Hidden states [T, H] to logits [T, this rank's part of the vocabulary]."""
    normed = rms_norm(hidden, weights.norm, shape.rms_norm_eps)
    return linear(shape.head_format, normed, weights.vocab, shape.vocab_size, False)


def attention(
    shape: Shape,
    x: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: AttentionWeights,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    norm_all: bool = False,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Writes this step's keys and values and attends: [T, H] to [T, H].

    ``norm_all``: a token's queries are normed together, and so are its keys. ``window``: tokens
    that a token sees, itself included; 0: all. ``softcap``: scores become
    softcap * tanh(score / softcap); 0: not. ``scale``: of scores; None: 1 / sqrt(D).
    """
    if shape.q_heads == 0:  # none are left for this rank
        return reduce(shape, x.new_zeros(x.shape[0], shape.hidden_size))
    dim = shape.head_dim
    q_size, kv_size = shape.q_heads * dim, shape.kv_heads * dim
    widths = [q_size, kv_size, kv_size]
    qkv = linear(shape.linear_format, x, weights.qkv, sum(widths), qkv_bias, widths)
    q, k, v = qkv.split(widths, -1)
    if norm_all:
        q, k = _normed(shape, q, k, weights.qk_norms)
    q, k, v = (part.view(part.shape[0], -1, dim) for part in (q, k, v))
    if weights.qk_norms and not norm_all:
        q, k = _normed(shape, q, k, weights.qk_norms)
    out = torch.ops.precast.paged_attention(
        rotate(q, rope),
        rotate(k, rope),
        v,
        cache.k,
        cache.v,
        *paging,
        dim**-0.5 if scale is None else scale,
        window,
        softcap,
        list(shape.query_groups),
        *weights.sinks,
    )
    out = out.view(-1, q_size)
    return reduce(
        shape, linear(shape.linear_format, out, weights.output, shape.hidden_size, output_bias)
    )


def _normed(shape: Shape, q: Tensor, k: Tensor, norms: list[Tensor]) -> tuple[Tensor, Tensor]:
    eps = shape.rms_norm_eps
    return rms_norm(q, norms[0], eps), rms_norm(k, norms[1], eps)


def gated_mlp(
    shape: Shape,
    x: Tensor,
    weights: MlpWeights,
    *,
    bias: bool = False,
    activate: Activation | None = None,
    size: int | None = None,
) -> Tensor:
    """down(activation(gate(x)) * up(x)): [T, H] to [T, H]; ``activate``: None is silu's; ``size``:
    columns on this rank, if they are not the model's ``intermediate_size``."""
    columns = shape.intermediate_size if size is None else size
    widths = [columns, columns]
    gate_up = linear(shape.linear_format, x, weights.gate_up, 2 * columns, bias, widths)
    x = (activate or silu_and_mul)(gate_up)
    return reduce(shape, linear(shape.linear_format, x, weights.down, shape.hidden_size, bias))


def expert_mlp(
    shape: Shape,
    x: Tensor,
    weights: ExpertWeights,
    options: ExpertOptions,
    *,
    router_bias: bool = False,
    limit: float = 0.0,
) -> Tensor:
    """Gated MLPs of the experts that a token's router likes best, by its weights: [T, H] to [T, H].

    ``limit``: gate and up are kept within it, and an expert is gate * sigmoid(1.702 gate) *
    (up + 1); 0: not.
    """
    scores = linear(shape.format_of("none"), x, weights.router, options.experts, router_bias)
    chosen, likes = torch.ops.precast.route(scores, options.experts_per_token, options.normalize)
    out = torch.ops.precast.fused_experts(
        x,
        chosen,
        likes,
        weights.gate_up,
        weights.down,
        options.expert_size,
        int(shape.linear_format),
        *(weights.biases or (None, None)),
        limit,
    )
    return reduce(shape, out)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    y: Tensor = torch.ops.precast.silu_and_mul(gate_up)
    return y


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    y: Tensor = torch.ops.precast.gelu_tanh_and_mul(gate_up)
    return y


def sigmoid_and_mul(gate: Tensor, x: Tensor) -> Tensor:
    """sigmoid(gate) * x: [T, 1] and [T, N] to [T, N]."""
    y: Tensor = torch.ops.precast.sigmoid_and_mul(gate, x)
    return y


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Values squeezed into (-cap, cap); as they are for 0."""
    y: Tensor = torch.ops.precast.soft_cap(x, cap) if cap else x
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.precast.rms_norm(x, weight, eps)
    return y


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of [T, heads, D], pairs (i, i + rotated / 2) as Hugging Face lays them out;
    features behind the rotated ones stay."""
    y: Tensor = torch.ops.precast.rotary(x, rope.cos, rope.sin)
    return y


def linear(
    fmt: Format,
    x: Tensor,
    weights: Linear,
    out_features: int,
    bias: bool,
    widths: list[int] | None = None,
) -> Tensor:
    """[T, K] to [T, out_features] through the kernel for the weights' format, and what adapters add
    to it. ``widths``: of the linears that it is made of, if they are several."""
    added, adapters = weights[1] if bias else None, weights[1 + bias :]
    y: Tensor
    if adapters:
        parts = widths or [out_features]
        y = torch.ops.precast.adapted_linear(x, weights[0], added, *adapters, parts, int(fmt))
    else:
        y = torch.ops.precast.linear(x, weights[0], added, out_features, int(fmt))
    return y


def reduce(shape: Shape, partial: Tensor) -> Tensor:
    """Sum of the ranks' partial results."""
    if shape.tp_size == 1:
        return partial
    total: Tensor = torch.ops.precast.all_reduce(partial)
    return total
