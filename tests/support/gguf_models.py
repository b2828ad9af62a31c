"""GGUF files of a Hugging Face folder's weights, as llama.cpp's converter would write them."""

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

ARCHITECTURES = {
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "smollm3": gguf.MODEL_ARCH.SMOLLM3,
}
INTERLEAVED = ("llama", "mistral", "smollm3")
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
    for name, tensor in _experts_together(tensors).items():
        module, _, kind = name.rpartition(".")
        theirs = names.get_name(module)
        assert theirs is not None, name
        values = _as_theirs(config, module, kind, tensor).contiguous().numpy()
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
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    part = rope.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(config.head_dim * part))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma3_text":
        local = config.rope_parameters["sliding_attention"]["rope_theta"]
        writer.add_float32("gemma3.rope.freq_base_swa", local)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


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
        if ".experts." in name:
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
