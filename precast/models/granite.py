"""Granite 3: Llama whose embeddings, scores, residuals and logits are multiplied by constants."""

from torch import Tensor

from precast.models import layers as blocks
from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    DecoderWeights,
    EmbedWeights,
    HeadWeights,
    Paging,
    Rope,
    attention,
    gated_mlp,
    rms_norm,
)
from precast.models.options import GraniteOptions, Kind
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def embed(
    shape: ModelShape[GraniteOptions], token_ids: Tensor, positions: Tensor, weights: EmbedWeights
) -> tuple[Tensor, ...]:
    hidden, *ropes = blocks.embed(shape, token_ids, positions, weights)
    return hidden * shape.options.embedding_scale, *ropes


def layer(
    shape: ModelShape[GraniteOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: DecoderWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    options, bias = shape.options, shape.options.attention_bias
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    attended = attention(
        shape,
        normed,
        rope,
        paging,
        cache,
        weights.attention,
        qkv_bias=bias,
        output_bias=bias,
        scale=options.query_scale,
    )
    hidden = hidden + attended * options.residual_scale
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    out = gated_mlp(shape, normed, weights.mlp, bias=options.mlp_bias)
    return hidden + out * options.residual_scale


def load_layer(load: Loader[GraniteOptions], kind: Kind, prefix: str) -> DecoderWeights:
    del kind
    options = load.shape.options
    bias = options.attention_bias
    return load.decoder(prefix, qkv_bias=bias, output_bias=bias, mlp_bias=options.mlp_bias)


def head(shape: ModelShape[GraniteOptions], hidden: Tensor, weights: HeadWeights) -> Tensor:
    return blocks.head(shape, hidden, weights) / shape.options.logit_divisor
