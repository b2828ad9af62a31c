"""Llama 2 and 3, SmolLM2, and what else shares the architecture."""

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    DecoderWeights,
    Paging,
    Rope,
    attention,
    embed,
    gated_mlp,
    head,
    rms_norm,
)
from precast.models.options import Kind, LlamaOptions
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[LlamaOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: DecoderWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    bias = shape.options.attention_bias
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    hidden = hidden + attention(
        shape, normed, rope, paging, cache, weights.attention, qkv_bias=bias, output_bias=bias
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    return hidden + gated_mlp(shape, normed, weights.mlp, bias=shape.options.mlp_bias)


def load_layer(load: Loader[LlamaOptions], kind: Kind, prefix: str) -> DecoderWeights:
    del kind
    options = load.shape.options
    bias = options.attention_bias
    return load.decoder(prefix, qkv_bias=bias, output_bias=bias, mlp_bias=options.mlp_bias)
