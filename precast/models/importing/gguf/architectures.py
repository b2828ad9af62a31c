"""GGUF's architectures: what sets each one's file apart, and its ``config.json``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from precast.errors import UnsupportedArchitecture
from precast.models.importing.gguf import configs
from precast.models.importing.gguf.configs import Config
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.metadata import Metadata, Sizes, check_keys, read_sizes
from precast.models.importing.gguf.rope import shortest
from precast.models.importing.gguf.tensors import MLP, NAMES, Layout
from precast.models.importing.gguf.tokenizer import Vocabulary


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


def architecture_of(file: GgufFile, name: str) -> GgufArchitecture:
    """Raises ``UnsupportedArchitecture``."""
    check_name(file.path, name)
    if name == "llama" and file.integer("llama.expert_count", 0) > 0:
        return _MIXTRAL
    return ARCHITECTURES[name]


def check_name(path: object, name: str) -> None:
    """Raises ``UnsupportedArchitecture``."""
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedArchitecture(
            f"{path}: architecture {ascii(name)[1:-1]} is not one of: {known}"
        )


def sizes_of(own: GgufArchitecture, data: Metadata, vocabulary: Vocabulary) -> Sizes:
    """Raises ``ModelCorrupt`` or ``UnsupportedArchitecture`` with one line."""
    check_keys(data, own.keys)
    return read_sizes(
        data,
        vocabulary,
        partly_rotated=own.partly_rotated,
        experts="expert_count" in own.keys,
        shared="expert_shared_feed_forward_length" in own.keys,
    )


def config_of(
    own: GgufArchitecture, data: Metadata, sizes: Sizes, vocabulary: Vocabulary
) -> Config:
    """``config.json``."""
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

_POST_NORMS: Final = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OLMO: Final = _without(_DENSE, "attn_norm", "ffn_norm") | _POST_NORMS
_GLM: Final = _without(_PLAIN, "ffn_gate") | {
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_up": "mlp.gate_up_proj",
}
_GPT_OSS_NAMES: Final = _without(_MOE, "ffn_norm", *_QK_NORMS) | {
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks": "self_attn.sinks",
    "ffn_gate_inp": "mlp.router",
}
_QWEN2_MOE: Final = _without(_MOE, *_QK_NORMS) | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_QWEN_EXPERTS: Final = ("mlp.experts.", "gate_proj", "up_proj", "down_proj")
_EXPERT_KEYS: Final = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
_WINDOW_KEYS: Final = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})

_MIXTRAL: Final = GgufArchitecture(
    name="MixtralForCausalLM",
    model_type="mixtral",
    layout=Layout(
        names=_without(_MOE, "ffn_gate_inp", *_QK_NORMS)
        | {"ffn_gate_inp": "block_sparse_moe.gate"},
        interleaved=True,
        experts=("block_sparse_moe.experts.", "w1", "w3", "w2"),
    ),
    config=configs.mixtral,
    keys=_EXPERT_KEYS,
)
"""Its files say that they are of architecture llama."""
ARCHITECTURES: Final[Mapping[str, GgufArchitecture]] = {
    "exaone4": GgufArchitecture(
        name="Exaone4ForCausalLM",
        model_type="exaone4",
        layout=Layout(names=_OLMO),
        config=configs.exaone4,
        keys=_WINDOW_KEYS,
    ),
    "gemma3": GgufArchitecture(
        name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        layout=Layout(names=_GEMMA, norms_plus_one=True),
        config=configs.gemma3,
        keys=_WINDOW_KEYS | {"rope.freq_base_swa", "final_logit_softcapping"},
    ),
    "glm4": GgufArchitecture(
        name="Glm4ForCausalLM",
        model_type="glm4",
        layout=Layout(names=_GLM, all_biased=False),
        config=configs.glm4,
        partly_rotated=True,
    ),
    "gpt-oss": GgufArchitecture(
        name="GptOssForCausalLM",
        model_type="gpt_oss",
        layout=Layout(names=_GPT_OSS_NAMES, stacked="mlp.experts."),
        config=configs.gpt_oss,
        keys=_EXPERT_KEYS | _WINDOW_KEYS,
    ),
    "granite": GgufArchitecture(
        name="GraniteForCausalLM",
        model_type="granite",
        layout=Layout(names=_PLAIN, interleaved=True),
        config=configs.granite,
        keys=frozenset({"attention.scale", "embedding_scale", "logit_scale", "residual_scale"}),
    ),
    "llama": GgufArchitecture(
        name="LlamaForCausalLM",
        model_type="llama",
        layout=Layout(names=_PLAIN, interleaved=True),
        config=configs.llama,
    ),
    "olmo2": GgufArchitecture(
        name="Olmo2ForCausalLM",
        model_type="olmo2",
        layout=Layout(names=_OLMO, long_norms=True),
        config=configs.olmo2,
    ),
    "phi3": GgufArchitecture(
        name="Phi3ForCausalLM",
        model_type="phi3",
        layout=Layout(names=_FUSED | {"ffn_up": "mlp.gate_up_proj"}),
        config=configs.phi3,
        keys=frozenset({"attention.sliding_window"}),
        partly_rotated=True,
    ),
    "qwen2": GgufArchitecture(
        name="Qwen2ForCausalLM",
        model_type="qwen2",
        layout=Layout(names=_PLAIN, all_biased=False),
        config=configs.qwen,
    ),
    "qwen2moe": GgufArchitecture(
        name="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        layout=Layout(names=_QWEN2_MOE, all_biased=False, experts=_QWEN_EXPERTS),
        config=configs.qwen2_moe,
        keys=_EXPERT_KEYS | {"expert_shared_feed_forward_length"},
    ),
    "qwen3": GgufArchitecture(
        name="Qwen3ForCausalLM",
        model_type="qwen3",
        layout=Layout(names=_DENSE),
        config=configs.qwen3,
    ),
    "qwen3moe": GgufArchitecture(
        name="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        layout=Layout(names=_MOE, experts=_QWEN_EXPERTS),
        config=configs.qwen3_moe,
        keys=_EXPERT_KEYS,
    ),
    "smollm3": GgufArchitecture(
        name="SmolLM3ForCausalLM",
        model_type="smollm3",
        layout=Layout(names=_PLAIN, interleaved=True),
        config=configs.smollm3,
    ),
}
"""By ``general.architecture``. Mistral's models are files of architecture llama."""
