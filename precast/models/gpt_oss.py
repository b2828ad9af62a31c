"""gpt-oss: experts with biases and limits in every layer; every second layer attends to a window;
each query head has a sink that takes its share of attention and gives nothing."""

import torch
from torch import Tensor

from precast.models.kv_cache import LayerCache
from precast.models.layers import (
    ExpertDecoderWeights,
    ExpertWeights,
    Paging,
    Rope,
    attention,
    embed,
    expert_mlp,
    head,
    rms_norm,
)
from precast.models.options import GptOssOptions, Kind
from precast.models.shape import ModelShape
from precast.models.weights.loader import Loader, head_norm
from precast.ops.scaled import Weight, below, floats

__all__ = ["embed", "head", "head_norm", "layer", "load_layer"]


def layer(
    shape: ModelShape[GptOssOptions],
    kind: Kind,
    hidden: Tensor,
    rope: Rope,
    paging: Paging,
    cache: LayerCache,
    weights: ExpertDecoderWeights,
) -> Tensor:
    """One decoder layer: hidden states [T, H] to [T, H]."""
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
        window=options.window if kind == "sliding" else 0,
    )
    normed = rms_norm(hidden, weights.mlp_norm, shape.rms_norm_eps)
    return hidden + expert_mlp(
        shape, normed, weights.mlp, options, router_bias=True, limit=options.limit
    )


def load_layer(load: Loader[GptOssOptions], kind: Kind, prefix: str) -> ExpertDecoderWeights:
    del kind
    bias = load.shape.options.attention_bias
    heads = load.attention(f"{prefix}self_attn.", qkv_bias=bias, output_bias=bias)
    return ExpertDecoderWeights(
        attention_norm=load.norm(f"{prefix}input_layernorm"),
        attention=heads._replace(sinks=(_load_sinks(load, f"{prefix}self_attn.sinks"),)),
        mlp_norm=load.norm(f"{prefix}post_attention_layernorm"),
        mlp=_load_experts(load, f"{prefix}mlp."),
    )


def _load_sinks(load: Loader[GptOssOptions], name: str) -> Tensor:
    cut = load.cut.q_heads
    sinks = floats(load.source.get(name, (cut.total,)))
    return load.arena.copy(sinks[cut.start : cut.stop].float())


def _load_experts(load: Loader[GptOssOptions], prefix: str) -> ExpertWeights:
    """Of a linear's outputs every second one is a gate, and the others are ups."""
    count, cut, hidden = load.shape.options.experts, load.cut.experts, load.shape.hidden_size
    both, out = f"{prefix}experts.gate_up_proj", f"{prefix}experts.down_proj"
    parts = [slice(2 * cut.start + i, 2 * cut.stop, 2) for i in range(2)]

    def gate_up(expert: int) -> Weight:
        weight = load.source.expert(both, expert, (count, hidden, 2 * cut.total))
        return below([weight[part] for part in parts])

    def down(expert: int) -> Weight:
        weight = load.source.expert(out, expert, (count, cut.total, hidden))
        return weight[:, cut.start : cut.stop]

    added = floats(load.source.get(f"{both}_bias", (count, 2 * cut.total))).float()
    added_out = floats(load.source.get(f"{out}_bias", (count, hidden))).float()
    if cut.start > 0:  # ranks' results are summed
        added_out = torch.zeros_like(added_out)
    return ExpertWeights(
        router=load.plain(f"{prefix}router", count, bias=True),
        gate_up=load.stack(both, count, gate_up),
        down=load.stack(out, count, down),
        biases=(
            load.arena.copy(torch.cat([added[:, part] for part in parts], dim=1)),
            load.arena.copy(added_out),
        ),
    )
