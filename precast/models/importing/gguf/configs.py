"""What each architecture's ``config.json`` has beside what all have.

Facts that the files leave out, because llama.cpp has them in its code, are here: Gemma 3's pattern
of windows, SmolLM3's layers without positions, the limit of gpt-oss' experts.
"""

from typing import Any, Final

from precast.errors import UnsupportedArchitecture
from precast.models.importing.gguf.metadata import Metadata, Sizes
from precast.models.importing.gguf.rope import read_rope, shortest
from precast.models.importing.gguf.tensors import ATTENTION, MLP, biased

Config = dict[str, Any]


def llama(data: Metadata, sizes: Sizes) -> Config:
    return {
        "attention_bias": bool(biased(data.file, ATTENTION)),
        "mlp_bias": bool(biased(data.file, MLP)),
        "rope_parameters": read_rope(data, sizes),
    }


def qwen(data: Metadata, sizes: Sizes) -> Config:
    return {"rope_parameters": read_rope(data, sizes), "use_sliding_window": False}


def qwen3(data: Metadata, sizes: Sizes) -> Config:
    return {**qwen(data, sizes), "attention_bias": bool(biased(data.file, ATTENTION))}


def qwen3_moe(data: Metadata, sizes: Sizes) -> Config:
    return {
        **qwen3(data, sizes),
        **_qwen_experts(data, sizes),
        "norm_topk_prob": True,
    }


def qwen2_moe(data: Metadata, sizes: Sizes) -> Config:
    return {
        **qwen(data, sizes),
        **_qwen_experts(data, sizes),
        "norm_topk_prob": False,
        "qkv_bias": bool(biased(data.file, ATTENTION)),
        "shared_expert_intermediate_size": sizes.shared_mlp,
    }


def _qwen_experts(data: Metadata, sizes: Sizes) -> Config:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.expert_mlp,
        "num_experts": sizes.experts,
        "num_experts_per_tok": data.positive("expert_used_count"),
    }


def mixtral(data: Metadata, sizes: Sizes) -> Config:
    return {
        "intermediate_size": sizes.expert_mlp,
        "num_experts_per_tok": data.positive("expert_used_count"),
        "num_local_experts": sizes.experts,
        "rope_parameters": read_rope(data, sizes),
    }


def gpt_oss(data: Metadata, sizes: Sizes) -> Config:
    """Its yarn goes by fractions of dimensions, its experts have this limit, and every second
    layer, the first one among them, has a window."""
    rope = read_rope(data, sizes)
    return {
        "attention_bias": True,
        "intermediate_size": sizes.expert_mlp,
        "layer_types": _window_kinds(data, sizes, every=2),
        "num_experts_per_tok": data.positive("expert_used_count"),
        "num_local_experts": sizes.experts,
        "rope_parameters": rope | ({"truncate": False} if rope["rope_type"] == "yarn" else {}),
        "sliding_window": data.positive("attention.sliding_window"),
        "swiglu_limit": 7.0,
    }


def _window_kinds(data: Metadata, sizes: Sizes, *, every: int) -> list[str]:
    """Of layers: as the file says, or all but each ``every``-th slide."""
    slides = data.flags("attention.sliding_window_pattern", sizes.layers) or [
        (index + 1) % every != 0 for index in range(sizes.layers)
    ]
    return ["sliding_attention" if one else "full_attention" for one in slides]


def olmo2(data: Metadata, sizes: Sizes) -> Config:
    return {
        "attention_bias": bool(biased(data.file, ATTENTION)),
        "rope_parameters": read_rope(data, sizes),
    }


def granite(data: Metadata, sizes: Sizes) -> Config:
    if not data.file.flag(data.key("rope.scaling.finetuned"), True):
        raise UnsupportedArchitecture(f"{data.file.path}: granite without positions")
    plain = sizes.head_dim**-0.5

    def scale(name: str, default: float = 1.0) -> float:
        return shortest(data.number(name, 0.0)) or default

    return {
        **llama(data, sizes),
        "attention_multiplier": scale("attention.scale", plain),
        "embedding_multiplier": scale("embedding_scale"),
        "logits_scaling": scale("logit_scale"),
        "residual_multiplier": scale("residual_scale"),
    }


def exaone4(data: Metadata, sizes: Sizes) -> Config:
    """With windows, layers that attend to all of the context have no positions."""
    window = data.integer("attention.sliding_window", 0)
    kinds = _window_kinds(data, sizes, every=4) if window else ["full_attention"] * sizes.layers
    return {
        "layer_types": kinds,
        "rope_parameters": read_rope(data, sizes),
        "sliding_window": window or None,
    }


def glm4(data: Metadata, sizes: Sizes) -> Config:
    part = {"partial_rotary_factor": sizes.rotary_dim / sizes.head_dim}
    return {
        "attention_bias": bool(biased(data.file, ATTENTION)),
        "rope_parameters": read_rope(data, sizes) | part,
        **part,
    }


def smollm3(data: Metadata, sizes: Sizes) -> Config:
    return {
        **llama(data, sizes),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((index + 1) % 4 != 0) for index in range(sizes.layers)],
        "use_sliding_window": False,
    }


def phi3(data: Metadata, sizes: Sizes) -> Config:
    return {
        "partial_rotary_factor": sizes.rotary_dim / sizes.head_dim,
        "rope_parameters": read_rope(data, sizes)
        | {"partial_rotary_factor": sizes.rotary_dim / sizes.head_dim},
        "sliding_window": data.integer("attention.sliding_window", 0) or None,
    }


_GEMMA3_PATTERN: Final = 6
"""Every sixth layer attends to all of the context."""
_GEMMA3_27B: Final = 62
"""Layers of the one whose scores are scaled by hidden size and heads."""


def gemma3(data: Metadata, sizes: Sizes) -> Config:
    by_heads = sizes.layers == _GEMMA3_27B
    window = data.integer("attention.sliding_window", 0)
    kinds = _window_kinds(data, sizes, every=_GEMMA3_PATTERN)
    local = {"rope_type": "default", "rope_theta": shortest(data.number("rope.freq_base_swa", 1e4))}
    return {
        "attention_bias": False,
        "final_logit_softcapping": data.number("final_logit_softcapping", 0.0) or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds if window else ["full_attention"] * sizes.layers,
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if by_heads else sizes.head_dim,
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {
            "full_attention": read_rope(data, sizes, base=1e6),
            "sliding_attention": local,
        },
        "sliding_window": window or None,
    }
