"""GLM-4: Llama whose checkpoints hold gate and up in one tensor and rotate neighbouring features of
a part of each head; GLM-4-0414 norms what comes out of attention and MLP as well.

Rows of queries and keys are put in order as they are read, so that the features that are rotated
together are half a rotation apart, as the kernels have them.
"""

from typing import NamedTuple

from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    AttentionWeights,
    MlpWeights,
    Paging,
    Rope,
    attention,
    embed,
    gated_mlp,
    head,
    rms_norm,
)
from precast.models.options import Glm4Options, Kind
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, Part, Rows, head_norm

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


class LayerWeights(NamedTuple):
    attention_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights
    out_norms: tuple[Tensor, ...]
    """Of attention and of the MLP, if there are any."""


def layer(
    shape: ModelShape[Glm4Options],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: LayerWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
    del kind
    eps, bias = shape.rms_norm_eps, shape.options.qkv_bias
    normed = rms_norm(hidden, weights.attention_norm, eps)
    out = attention(shape, normed, rope, paging, cache, weights.attention, qkv_bias=bias)
    hidden = hidden + (rms_norm(out, weights.out_norms[0], eps) if weights.out_norms else out)
    out = gated_mlp(shape, rms_norm(hidden, weights.mlp_norm, eps), weights.mlp)
    return hidden + (rms_norm(out, weights.out_norms[1], eps) if weights.out_norms else out)


def load_layer(load: Loader[Glm4Options], kind: Kind, prefix: str) -> LayerWeights:
    del kind
    options, mlp = load.shape.options, load.cut.mlp
    names = ("post_self_attn", "post_mlp") if options.out_norms else ()
    gate_up = f"{prefix}mlp.gate_up_proj"
    return LayerWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm"),
        attention=load.attention(
            f"{prefix}self_attn.", qkv_bias=options.qkv_bias, interleaved=load.shape.rotary_dim
        ),
        mlp_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=MlpWeights(
            gate_up=load.rows([_half(gate_up, mlp, 0), _half(gate_up, mlp, mlp.total)]),
            down=load.columns(f"{prefix}mlp.down_proj", mlp),
        ),
        out_norms=tuple(load.norm(f"{prefix}{name}_layernorm") for name in names),
    )


def _half(name: str, part: Part, start: int) -> Rows:
    """This rank's rows of a matrix that begins at a row of a tensor with two of them."""
    return Rows(name, start + part.start, start + part.stop, 2 * part.total)
