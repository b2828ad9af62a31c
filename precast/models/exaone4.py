"""EXAONE 4: norms behind attention and MLP instead of before them, and on queries and keys; where
layers attend to a window, those that attend to all have no positions.

Those use a second rope that rotates by nothing, as in SmolLM3.
"""

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
from precast.models.options import Kind, WindowOptions
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[WindowOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: PostNormWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    window, eps = shape.options.window if kind == "sliding" else 0, shape.rms_norm_eps
    attended = attention(shape, hidden, rope, paging, cache, weights.attention, window=window)
    hidden = hidden + rms_norm(attended, weights.attention_out_norm, eps)
    return hidden + rms_norm(gated_mlp(shape, hidden, weights.mlp), weights.mlp_out_norm, eps)


def load_layer(load: Loader[WindowOptions], kind: Kind, prefix: str) -> PostNormWeights:
    del kind
    return PostNormWeights(
        attention=load.attention(f"{prefix}self_attn.", qk_norms=True),
        attention_out_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=load.mlp(f"{prefix}mlp."),
        mlp_out_norm=load.norm(f"{prefix}post_feedforward_layernorm"),
    )
