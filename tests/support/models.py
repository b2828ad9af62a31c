"""Tiny models on disk: a Hugging Face folder with random weights and a byte-level tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models

VOCABULARY = 260
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 2, 4, 2, 8, 64


def config(**changes: Any) -> dict[str, Any]:
    """``config.json`` of the tiny model; None removes an entry."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "eos_token_id": 256,
    }
    return {name: value for name, value in (values | changes).items() if value is not None}


def tensors(seed: int = 0) -> dict[str, "np.ndarray[Any, Any]"]:
    """Every tensor of the tiny model."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for index in range(LAYERS):
        shapes |= {
            f"model.layers.{index}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (HIDDEN,)),
                ("post_attention_layernorm", (HIDDEN,)),
                ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
                ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
                ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
                ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
                ("mlp.gate_proj", (MLP, HIDDEN)),
                ("mlp.up_proj", (MLP, HIDDEN)),
                ("mlp.down_proj", (HIDDEN, MLP)),
            )
        }
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 2
        else np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }


def write_model(folder: Path, **config_changes: Any) -> Path:
    """A complete, servable folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(**config_changes)))
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def _tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer
