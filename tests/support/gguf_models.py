"""GGUF files of a Hugging Face folder's weights, as llama.cpp's converter would write them."""

import math
import re
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

ARCHITECTURES = {
    "exaone4": gguf.MODEL_ARCH.EXAONE4,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "glm4": gguf.MODEL_ARCH.GLM4,
    "gpt_oss": gguf.MODEL_ARCH.GPT_OSS,
    "granite": gguf.MODEL_ARCH.GRANITE,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "mixtral": gguf.MODEL_ARCH.LLAMA,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2_moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
INTERLEAVED = ("granite", "llama", "mistral", "mixtral", "smollm3")
Kinds = dict[str, GGMLQuantizationType]


def write_gguf_of(folder: Path, path: Path, kinds: Kinds | None = None) -> Path:
    """``kinds``: by GGUF's names without layers; float32 where there is none."""
    config = AutoConfig.from_pretrained(folder)
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config)
    _write_vocabulary(writer, config.vocab_size - 10)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tensors |= _longrope(writer, config)
    for name, tensor in _halves_apart(config, _experts_together(tensors)).items():
        module, _, kind = name.rpartition(".")
        theirs = name.removesuffix(f".{kind}") if name in _ROPE else names.get_name(module)
        assert theirs is not None, name
        values = _as_theirs(config, module, kind, tensor).squeeze().contiguous().numpy()
        wanted = (kinds or {}).get(theirs.split(".")[-1])
        if wanted is None or values.ndim < 2:
            writer.add_tensor(f"{theirs}.{kind}", values)
        else:
            blocks = gguf.quants.quantize(values, wanted)
            writer.add_tensor(f"{theirs}.{kind}", blocks, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    _write_rope(writer, config)
    _WRITERS.get(config.model_type, lambda *_: None)(writer, config)


def _write_rope(writer: GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    part = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config.head_dim * part))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _exaone4(writer: GGUFWriter, config: Any) -> None:
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(["sliding" in kind for kind in config.layer_types])


def _gemma3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    writer.add_float32("gemma3.rope.freq_base_swa", local)


def _phi3(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window or 0)


def _granite(writer: GGUFWriter, config: Any) -> None:
    writer.add_attention_scale(config.attention_multiplier)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)


def _mixtral(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)


def _gpt_oss(writer: GGUFWriter, config: Any) -> None:
    _mixtral(writer, config)
    writer.add_sliding_window(config.sliding_window)
    writer.add_expert_feed_forward_length(config.intermediate_size)


def _qwen3_moe(writer: GGUFWriter, config: Any) -> None:
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _qwen2_moe(writer: GGUFWriter, config: Any) -> None:
    _qwen3_moe(writer, config)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


_WRITERS = {
    "exaone4": _exaone4,
    "gemma3_text": _gemma3,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "mixtral": _mixtral,
    "phi3": _phi3,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}
_ROPE = ("rope_factors_long.weight", "rope_factors_short.weight")


def _longrope(writer: GGUFWriter, config: Any) -> dict[str, Tensor]:
    """Of Phi-4-mini, as their converter writes it."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return {}
    first = rope["original_max_position_embeddings"]
    scale = config.max_position_embeddings / first
    writer.add_rope_scaling_orig_ctx_len(first)
    longer = math.log(scale) / math.log(first)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + longer) if scale > 1 else 1.0)
    return dict(
        zip(_ROPE, (torch.tensor(rope[f"{x}_factor"]) for x in ("long", "short")), strict=True)
    )


def _halves_apart(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """gpt-oss has gates and ups in turns, and inputs first; their converter has neither."""
    if config.model_type != "gpt_oss":
        return tensors
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("sinks"):
            found[f"{name}.weight"] = tensor
        elif ".experts." not in name:
            found[name] = tensor
        else:
            base = name.removesuffix("_bias")
            kind = "bias" if name != base else "weight"
            rows = tensor if kind == "bias" else tensor.transpose(1, 2)
            if base.endswith("gate_up_proj"):
                for first, part in enumerate(("gate_proj", "up_proj")):
                    found[base.replace("gate_up_proj", f"{part}.{kind}")] = rows[:, first::2]
            else:
                found[f"{base}.{kind}"] = rows
    return found


def _write_vocabulary(writer: GGUFWriter, count: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["t", "1", *(f"t{index}" for index in range(1, count - 1))])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(2)


def _experts_together(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of all experts of a layer, as their converter stacks them."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if re.search(r"\.experts\.\d", name):
            before, _, after = name.partition(".experts.")
            number, _, module = after.partition(".")
            stacks.setdefault(f"{before}.experts.{module}", {})[int(number)] = tensor
        else:
            found[name] = tensor
    for name, stack in stacks.items():
        found[name] = torch.stack([stack[index] for index in range(len(stack))])
    return found


def _as_theirs(config: Any, module: str, kind: str, tensor: Tensor) -> Tensor:
    if config.model_type in INTERLEAVED and module.endswith(("q_proj", "k_proj")):
        keys = module.endswith("k_proj")
        heads = config.num_key_value_heads if keys else config.num_attention_heads
        halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return halves.swapaxes(1, 2).reshape(tensor.shape)
    if config.model_type == "gemma3_text" and module.endswith("norm") and kind == "weight":
        return tensor + 1
    return tensor
