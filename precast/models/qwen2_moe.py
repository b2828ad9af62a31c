"""Qwen2 with experts in place of the MLP, in all layers or in those that are not "dense", and
beside them an expert that all tokens go through, as far as a gate lets it."""

from typing import NamedTuple

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    AttentionWeights,
    ExpertWeights,
    Linear,
    MlpWeights,
    Paging,
    Rope,
    attention,
    embed,
    expert_mlp,
    gated_mlp,
    head,
    linear,
    rms_norm,
    sigmoid_and_mul,
)
from precast.models.options import Kind, Qwen2MoeOptions
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


class Mixture(NamedTuple):
    experts: ExpertWeights
    shared: MlpWeights
    shared_gate: Linear
    """Not quantised: [1, H]."""


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights | Mixture


def layer(
    shape: ModelShape[Qwen2MoeOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: LayerWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    bias = shape.options.qkv_bias
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    hidden = hidden + attention(
        shape, normed, rope, paging, cache, weights.attention, qkv_bias=bias
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    if isinstance(weights.mlp, MlpWeights):
        return hidden + gated_mlp(shape, normed, weights.mlp)
    return hidden + _mixture(shape, normed, weights.mlp)


def _mixture(shape: ModelShape[Qwen2MoeOptions], x: Tensor, weights: Mixture) -> Tensor:
    chosen = expert_mlp(shape, x, weights.experts, shape.options)
    shared = gated_mlp(shape, x, weights.shared, size=shape.options.shared_size)
    gate = linear(shape.format_of("none"), x, weights.shared_gate, 1, False)
    return chosen + sigmoid_and_mul(gate, shared)


def load_layer(load: Loader[Qwen2MoeOptions], kind: Kind, prefix: str) -> LayerWeights:
    mlp = f"{prefix}mlp."
    return LayerWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm"),
        attention=load.attention(f"{prefix}self_attn.", qkv_bias=load.shape.options.qkv_bias),
        mlp_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=_load_mixture(load, mlp) if kind == "moe" else load.mlp(mlp),
    )


def _load_mixture(load: Loader[Qwen2MoeOptions], prefix: str) -> Mixture:
    return Mixture(
        experts=load.experts(prefix, load.shape.options.experts),
        shared=load.mlp(f"{prefix}shared_expert.", part=load.cut.shared),
        shared_gate=load.plain(f"{prefix}shared_expert_gate", 1),
    )
