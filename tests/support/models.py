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


def tensors(seed: int = 0, **changes: Any) -> dict[str, "np.ndarray[Any, Any]"]:
    """Every tensor of the tiny model, or of one whose ``config`` has these changes."""
    values = config(**changes)
    hidden, mlp = values["hidden_size"], values["intermediate_size"]
    q_size = values["num_attention_heads"] * values["head_dim"]
    kv_size = values["num_key_value_heads"] * values["head_dim"]
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "model.norm.weight": (hidden,)}
    for index in range(values["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{index}.{name}.weight": shape
            for name, shape in (
                ("input_layernorm", (hidden,)),
                ("post_attention_layernorm", (hidden,)),
                ("self_attn.q_proj", (q_size, hidden)),
                ("self_attn.k_proj", (kv_size, hidden)),
                ("self_attn.v_proj", (kv_size, hidden)),
                ("self_attn.o_proj", (hidden, q_size)),
                ("mlp.gate_proj", (mlp, hidden)),
                ("mlp.up_proj", (mlp, hidden)),
                ("mlp.down_proj", (hidden, mlp)),
            )
        }
        if values.get("attention_bias"):
            names = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
            shapes |= {
                f"model.layers.{index}.self_attn.{name}.bias": (size,)
                for name, size in (*names, ("o_proj", hidden))
            }
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 2 or name.endswith(".bias")
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
