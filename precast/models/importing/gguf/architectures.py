"""GGUF's architectures: what sets each one's file apart, and its ``config.json``.

Facts that the files leave out, because llama.cpp has them in its code, are here: Gemma 3's pattern
of windows, SmolLM3's layers without positions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from precast.errors import UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.metadata import Metadata, Sizes, check_keys, read_sizes
from precast.models.importing.gguf.rope import read_rope, shortest
from precast.models.importing.gguf.tensors import ATTENTION, MLP, NAMES, Layout, biased
from precast.models.importing.gguf.tokenizer import Vocabulary

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    name: str
    """Of Hugging Face's class."""
    model_type: str
    layout: Layout
    config: Callable[[Metadata, Sizes], Config]
    """What its ``config.json`` has beside what all have."""
    keys: frozenset[str] = field(default_factory=frozenset)
    """Entries that it has beside those that all have."""
    partly_rotated: bool = False
    experts: bool = False


def architecture_of(file: GgufFile, name: str) -> GgufArchitecture:
    """Raises ``UnsupportedArchitecture``."""
    check_name(file.path, name)
    return ARCHITECTURES[name]


def check_name(path: object, name: str) -> None:
    """Raises ``UnsupportedArchitecture``."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedArchitecture(
            f"{path}: architecture {ascii(name)[1:-1]} is not one of: {known}"
        )


def sizes_of(data: Metadata, vocabulary: Vocabulary) -> Sizes:
    """Raises ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line."""
    own = ARCHITECTURES[data.architecture]
    check_keys(data, own.keys)
    return read_sizes(data, vocabulary, partly_rotated=own.partly_rotated, experts=own.experts)


def config_of(data: Metadata, sizes: Sizes, vocabulary: Vocabulary) -> Config:
    """``config.json``."""
    own = ARCHITECTURES[data.architecture]
    return {
        "architectures": [own.name],
        "bos_token_id": vocabulary.bos,
        "dtype": "float32",
        "eos_token_id": vocabulary.eos,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": data.positive("context_length"),
        "model_type": own.model_type,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "pad_token_id": vocabulary.padding,
        "rms_norm_eps": shortest(data.number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in data.file.tensors,
        "vocab_size": sizes.vocabulary,
        **own.config(data, sizes),
    }


def _llama(data: Metadata, sizes: Sizes) -> Config:
    return {
        "attention_bias": bool(biased(data.file, ATTENTION)),
        "mlp_bias": bool(biased(data.file, MLP)),
        "rope_parameters": read_rope(data, sizes),
    }


def _qwen(data: Metadata, sizes: Sizes) -> Config:
    return {"rope_parameters": read_rope(data, sizes), "use_sliding_window": False}


def _qwen3(data: Metadata, sizes: Sizes) -> Config:
    return {**_qwen(data, sizes), "attention_bias": bool(biased(data.file, ATTENTION))}


def _qwen3_moe(data: Metadata, sizes: Sizes) -> Config:
    return {
        **_qwen3(data, sizes),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.expert_mlp,
        "norm_topk_prob": True,
        "num_experts": sizes.experts,
        "num_experts_per_tok": data.positive("expert_used_count"),
    }


def _smollm3(data: Metadata, sizes: Sizes) -> Config:
    return {
        **_llama(data, sizes),
        "no_rope_layer_interval": 4,
        "no_rope_layers": [int((index + 1) % 4 != 0) for index in range(sizes.layers)],
        "use_sliding_window": False,
    }


def _phi3(data: Metadata, sizes: Sizes) -> Config:
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


def _gemma3(data: Metadata, sizes: Sizes) -> Config:
    by_heads = sizes.layers == _GEMMA3_27B
    window = data.integer("attention.sliding_window", 0)
    kinds = [
        "full_attention"
        if not window or (index + 1) % _GEMMA3_PATTERN == 0
        else "sliding_attention"
        for index in range(sizes.layers)
    ]
    local = {"rope_type": "default", "rope_theta": shortest(data.number("rope.freq_base_swa", 1e4))}
    return {
        "attention_bias": False,
        "final_logit_softcapping": data.number("final_logit_softcapping", 0.0) or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": kinds,
        "query_pre_attn_scalar": sizes.hidden // sizes.heads if by_heads else sizes.head_dim,
        "rope_local_base_freq": local["rope_theta"],
        "rope_parameters": {
            "full_attention": read_rope(data, sizes, base=1e6),
            "sliding_attention": local,
        },
        "sliding_window": window or None,
    }


def _without(names: Mapping[str, str], *left_out: str) -> dict[str, str]:
    return {name: ours for name, ours in names.items() if name not in left_out}


_QK_NORMS: Final = ("attn_q_norm", "attn_k_norm")
_DENSE: Final = _without(NAMES, "attn_qkv", "ffn_gate_inp")
_PLAIN: Final = _without(_DENSE, *_QK_NORMS)
_MOE: Final = _without(NAMES, "attn_qkv", *MLP)
_FUSED: Final = _without(
    NAMES, "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_gate_inp", *_QK_NORMS
)
_GEMMA: Final = _DENSE | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = {
    "gemma3": GgufArchitecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layout=Layout(names=_GEMMA, norms_plus_one=True),
        config=_gemma3,
        keys=frozenset(
            {"attention.sliding_window", "rope.freq_base_swa", "final_logit_softcapping"}
        ),
    ),
    "llama": GgufArchitecture(
        name="LlamaForCausalLM",
        model_type="llama",
        layout=Layout(names=_PLAIN, interleaved=True),
        config=_llama,
    ),
    "phi3": GgufArchitecture(
        name="Phi3ForCausalLM",
        model_type="phi3",
        layout=Layout(names=_FUSED | {"ffn_up": "mlp.gate_up_proj"}),
        config=_phi3,
        keys=frozenset({"attention.sliding_window"}),
        partly_rotated=True,
    ),
    "qwen2": GgufArchitecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        layout=Layout(names=_PLAIN, all_biased=False),
        config=_qwen,
    ),
    "qwen3": GgufArchitecture(
        name="Qwen3ForCausalLM", model_type="qwen3", layout=Layout(names=_DENSE), config=_qwen3
    ),
    "qwen3moe": GgufArchitecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layout=Layout(names=_MOE),
        config=_qwen3_moe,
        keys=frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"}),
        experts=True,
    ),
    "smollm3": GgufArchitecture(
        name="SmolLM3ForCausalLM",
        model_type="smollm3",
        layout=Layout(names=_PLAIN, interleaved=True),
        config=_smollm3,
    ),
}
"""By ``general.architecture``. Mistral's models are files of architecture llama."""
