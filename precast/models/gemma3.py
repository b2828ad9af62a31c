"""Gemma 3, text only: norms on both sides of attention and MLP, on queries and keys, embeddings
times sqrt(H); most layers attend to a window and have a rope of their own.

Norms multiply by 1 + weight; the 1 is added at load. Soft caps are for relatives: Gemma 3 has none.
"""

from typing import NamedTuple

from torch import Tensor

from precast.models import layers as blocks
from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    AttentionWeights,
    EmbedWeights,
    HeadWeights,
    MlpWeights,
    Paging,
    Rope,
    attention,
    gated_mlp,
    gelu_tanh_and_mul,
    rms_norm,
    soft_cap,
)
from precast.models.options import Gemma3Options, Kind
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    attention: AttentionWeights
    attention_out_norm: Tensor
    mlp_norm: Tensor
    mlp: MlpWeights
    mlp_out_norm: Tensor


def embed(
    shape: ModelShape[Gemma3Options], token_ids: Tensor, positions: Tensor, weights: EmbedWeights
) -> tuple[Tensor, ...]:
    hidden, *ropes = blocks.embed(shape, token_ids, positions, weights)
    return hidden * shape.hidden_size**0.5, *ropes


def layer(
    shape: ModelShape[Gemma3Options],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: LayerWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    options, eps = shape.options, shape.rms_norm_eps
    attended = attention(
        shape,
        rms_norm(hidden, weights.attention_norm, eps),
        rope,
        paging,
        cache,
        weights.attention,
        qkv_bias=options.attention_bias,
        output_bias=options.attention_bias,
        window=options.window if kind == "sliding" else 0,
        softcap=options.attention_softcap,
        scale=options.query_scale,
    )
    hidden = hidden + rms_norm(attended, weights.attention_out_norm, eps)
    normed = rms_norm(hidden, weights.mlp_norm, eps)
    out = gated_mlp(shape, normed, weights.mlp, activate=gelu_tanh_and_mul)
    return hidden + rms_norm(out, weights.mlp_out_norm, eps)


def head(shape: ModelShape[Gemma3Options], hidden: Tensor, weights: HeadWeights) -> Tensor:
    return soft_cap(blocks.head(shape, hidden, weights), shape.options.logit_softcap)


def load_layer(load: Loader[Gemma3Options], kind: Kind, prefix: str) -> LayerWeights:
    del kind
    bias = load.shape.options.attention_bias
    heads = load.attention(f"{prefix}self_attn.", qkv_bias=bias, output_bias=bias, qk_norms=True)
    return LayerWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm") + 1,
        attention=heads._replace(qk_norms=[weight + 1 for weight in heads.qk_norms]),
        attention_out_norm=load.norm(f"{prefix}post_attention_layernorm") + 1,
        mlp_norm=load.norm(f"{prefix}pre_feedforward_layernorm") + 1,
        mlp=load.mlp(f"{prefix}mlp."),
        mlp_out_norm=load.norm(f"{prefix}post_feedforward_layernorm") + 1,
    )


def head_norm(load: Loader[Gemma3Options]) -> Tensor:
    return load.norm("model.norm") + 1
