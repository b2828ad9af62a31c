"""Mixtral: Mistral with experts in place of the MLP."""

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    ExpertDecoderWeights,
    Paging,
    Rope,
    attention,
    embed,
    expert_mlp,
    head,
    rms_norm,
)
from precast.models.options import ExpertOptions, Kind
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[ExpertOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: ExpertDecoderWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    window = shape.options.window
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    hidden = hidden + attention(
        shape, normed, rope, paging, cache, weights.attention, window=window
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    return hidden + expert_mlp(shape, normed, weights.mlp, shape.options)


def load_layer(load: Loader[ExpertOptions], kind: Kind, prefix: str) -> ExpertDecoderWeights:
    del kind
    mlp, names = f"{prefix}block_sparse_moe.", ("w1", "w3", "w2")
    return ExpertDecoderWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm"),
        attention=load.attention(f"{prefix}self_attn."),
        mlp_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=load.experts(mlp, load.shape.options.experts, names),
    )
