"""OLMo 2: norms behind attention and MLP instead of before them, and on all queries and on all keys
of a token together. These are over all heads, so a model is on one rank."""

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    Paging,
    PostNormWeights,
    Rope,
    attention,
    embed,
    gated_mlp,
    head,
    rms_norm,
)
from precast.models.options import Kind, Olmo2Options
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[Olmo2Options],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: PostNormWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    bias, eps = shape.options.attention_bias, shape.rms_norm_eps
    attended = attention(
        shape,
        hidden,
        rope,
        paging,
        cache,
        weights.attention,
        qkv_bias=bias,
        output_bias=bias,
        norm_all=True,
    )
    hidden = hidden + rms_norm(attended, weights.attention_out_norm, eps)
    return hidden + rms_norm(gated_mlp(shape, hidden, weights.mlp), weights.mlp_out_norm, eps)


def load_layer(load: Loader[Olmo2Options], kind: Kind, prefix: str) -> PostNormWeights:
    del kind
    bias, dim, cut = load.shape.options.attention_bias, load.shape.head_dim, load.cut
    heads = load.attention(f"{prefix}self_attn.", qkv_bias=bias, output_bias=bias)
    norms = [
        load.norm(f"{prefix}self_attn.{name}_norm", part.total * dim)
        for name, part in (("q", cut.q_heads), ("k", cut.kv_heads))
    ]
    return PostNormWeights(
        attention=heads._replace(qk_norms=norms),
        attention_out_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=load.mlp(f"{prefix}mlp."),
        mlp_out_norm=load.norm(f"{prefix}post_feedforward_layernorm"),
    )
