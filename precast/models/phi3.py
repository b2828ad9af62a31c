"""Phi-3: Llama whose checkpoints hold queries, keys and values in one tensor, and gate and up in
another; some models rotate only a part of each head.
"""

from itertools import accumulate

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    AttentionWeights,
    DecoderWeights,
    MlpWeights,
    Paging,
    Rope,
    attention,
    embed,
    gated_mlp,
    head,
    rms_norm,
)
from precast.models.options import Kind, WindowOptions
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, Part, Rows, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[WindowOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: DecoderWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    window = shape.options.window if kind == "sliding" else 0
    normed = rms_norm(hidden, weights.attention_norm, shape.rms_norm_eps)
    hidden = hidden + attention(
        shape, normed, rope, paging, cache, weights.attention, window=window
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    return hidden + gated_mlp(shape, normed, weights.mlp)


def load_layer(load: Loader[WindowOptions], kind: Kind, prefix: str) -> DecoderWeights:
    del kind
    q, kv = load.cut.q_heads * load.shape.head_dim, load.cut.kv_heads * load.shape.head_dim
    qkv = fused(f"{prefix}self_attn.qkv_proj", q, kv, kv)
    mlp = load.cut.mlp
    return DecoderWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm"),
        attention=AttentionWeights(
            qkv=load.rows(qkv),
            output=load.columns(f"{prefix}self_attn.o_proj", q),
            qk_norms=[],
        ),
        mlp_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=MlpWeights(
            gate_up=load.rows(fused(f"{prefix}mlp.gate_up_proj", mlp, mlp)),
            down=load.columns(f"{prefix}mlp.down_proj", mlp),
        ),
    )


def fused(name: str, *parts: Part) -> list[Rows]:
    """This rank's rows of a tensor in which several matrices lie one below the other."""
    total = sum(part.total for part in parts)
    starts = accumulate((part.total for part in parts), initial=0)
    return [
        Rows(name, start + part.start, start + part.stop, total)
        for start, part in zip(starts, parts, strict=False)
    ]
