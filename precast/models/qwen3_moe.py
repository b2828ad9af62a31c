"""Qwen3 with experts in place of the MLP, in all layers or in those that are not "dense"."""

from typing import NamedTuple

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    AttentionWeights,
    ExpertWeights,
    MlpWeights,
    Paging,
    Rope,
    attention,
    embed,
    expert_mlp,
    gated_mlp,
    head,
    rms_norm,
)
from precast.models.options import Kind, Qwen3MoeOptions
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights | ExpertWeights


def layer(
    shape: ModelShape[Qwen3MoeOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: LayerWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    options, bias = shape.options, shape.options.attention_bias
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    hidden = hidden + attention(
        shape,
        normed,
        rope,
        paging,
        cache,
        weights.attention,
        qkv_bias=bias,
        output_bias=bias,
        window=options.window,
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    if isinstance(weights.mlp, MlpWeights):
        return hidden + gated_mlp(shape, normed, weights.mlp)
    return hidden + expert_mlp(shape, normed, weights.mlp, options)


def load_layer(load: Loader[Qwen3MoeOptions], kind: Kind, prefix: str) -> LayerWeights:
    options, mlp = load.shape.options, f"{prefix}mlp."
    bias = options.attention_bias
    return LayerWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm"),
        attention=load.attention(
            f"{prefix}self_attn.", qkv_bias=bias, output_bias=bias, qk_norms=True
        ),
        mlp_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=load.experts(mlp, options.experts) if kind == "moe" else load.mlp(mlp),
    )
