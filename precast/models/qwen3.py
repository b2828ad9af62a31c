"""Qwen3: queries and keys are normed head by head; some layers may attend to a window."""

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
from precast.models.options import Kind, Qwen3Options
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[Qwen3Options],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: DecoderWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    bias = shape.options.attention_bias
    window = shape.options.window if kind == "sliding" else 0
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
        window=window,
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    return hidden + gated_mlp(shape, normed, weights.mlp)


def load_layer(load: Loader[Qwen3Options], kind: Kind, prefix: str) -> DecoderWeights:
    del kind
    bias = load.shape.options.attention_bias
    return load.decoder(prefix, qkv_bias=bias, output_bias=bias, qk_norms=True)
