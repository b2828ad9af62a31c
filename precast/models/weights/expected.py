"""The tensors that a model of each architecture has, by name, from its configuration alone.

Needs no torch: an import and a start look here before anything large is read. A test holds it
against what the architectures' loaders ask for.
"""

import itertools
from collections.abc import Iterator
from typing import Final

from precast.models.config import ModelConfig
from precast.models.options import ExpertOptions, GptOssOptions, Kind

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS: Final = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OLMO_NORMS: Final = ("post_attention_layernorm", "post_feedforward_layernorm")
_LAYER_NORMS: Final = {"exaone4": _OLMO_NORMS, "gemma3": _GEMMA_NORMS, "olmo2": _OLMO_NORMS}
_WITH_QK_NORMS: Final = ("exaone4", "gemma3", "qwen3", "qwen3_moe")
_GLM4_OUT_NORMS: Final = ("post_self_attn_layernorm", "post_mlp_layernorm")
_FUSED: Final = ("phi3",)
"""Architectures whose queries, keys and values are one tensor."""
_FUSED_MLP: Final = ("glm4", "phi3")
"""Architectures whose gate and up are."""


def expected_tensors(config: ModelConfig, at_most: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, or of the first ``at_most``: a configuration may count more of them
    than any memory holds."""
    return dict(itertools.islice(_all(config), at_most))


def _all(config: ModelConfig) -> Shapes:
    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", table
    yield "model.norm.weight", (config.hidden_size,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", table
    for index, planned in enumerate(config.layers):
        for name, shape in _layer(config, planned.kind):
            yield f"model.layers.{index}.{name}", shape


def _layer(config: ModelConfig, kind: Kind) -> Shapes:
    norms = _LAYER_NORMS.get(config.architecture, _NORMS)
    if getattr(config.options, "out_norms", False):
        norms = (*norms, *_GLM4_OUT_NORMS)
    for norm in norms:
        yield f"{norm}.weight", (config.hidden_size,)
    yield from _attention(config)
    options = config.options
    if isinstance(options, GptOssOptions):
        yield from _gpt_oss(config, options.experts)
    elif isinstance(options, ExpertOptions) and kind == "moe":
        yield from _mixture(config, options)
    else:
        bias = bool(getattr(config.options, "mlp_bias", False))
        yield from _mlp(config, "mlp.", config.intermediate_size, bias)


def _attention(config: ModelConfig) -> Shapes:
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    bias = bool(getattr(config.options, "attention_bias", False))
    qkv_bias = bias or getattr(config.options, "qkv_bias", config.architecture == "qwen2")
    rows = {"q": q, "k": kv, "v": kv}
    if config.architecture in _FUSED:
        rows = {"qkv": q + 2 * kv}
    for name, size in rows.items():
        yield from _linear(f"self_attn.{name}_proj", size, config.hidden_size, qkv_bias)
    yield from _linear("self_attn.o_proj", config.hidden_size, q, bias)
    yield from _qk_norms(config, q, kv)


def _qk_norms(config: ModelConfig, q: int, kv: int) -> Shapes:
    if config.architecture in _WITH_QK_NORMS:
        q = kv = config.head_dim
    elif config.architecture != "olmo2":
        return
    yield "self_attn.q_norm.weight", (q,)
    yield "self_attn.k_norm.weight", (kv,)


def _mlp(config: ModelConfig, prefix: str, size: int, bias: bool = False) -> Shapes:
    rows = {"gate": size, "up": size}
    if config.architecture in _FUSED_MLP:
        rows = {"gate_up": 2 * size}
    for name, count in rows.items():
        yield from _linear(f"{prefix}{name}_proj", count, config.hidden_size, bias)
    yield from _linear(f"{prefix}down_proj", config.hidden_size, size, bias)


def _mixture(config: ModelConfig, options: ExpertOptions) -> Shapes:
    if config.architecture == "mixtral":
        yield from _mixtral(config, options.experts)
        return
    yield "mlp.gate.weight", (options.experts, config.hidden_size)
    for expert in range(options.experts):
        yield from _mlp(config, f"mlp.experts.{expert}.", config.expert_size)
    if config.shared_size:
        yield from _mlp(config, "mlp.shared_expert.", config.shared_size)
        yield "mlp.shared_expert_gate.weight", (1, config.hidden_size)


def _gpt_oss(config: ModelConfig, count: int) -> Shapes:
    size, hidden = config.expert_size, config.hidden_size
    yield "self_attn.sinks", (config.q_heads,)
    yield from _linear("mlp.router", count, hidden, True)
    yield "mlp.experts.gate_up_proj", (count, hidden, 2 * size)
    yield "mlp.experts.gate_up_proj_bias", (count, 2 * size)
    yield "mlp.experts.down_proj", (count, size, hidden)
    yield "mlp.experts.down_proj_bias", (count, hidden)


def _mixtral(config: ModelConfig, count: int) -> Shapes:
    prefix, rows = "block_sparse_moe.", (config.expert_size, config.hidden_size)
    yield f"{prefix}gate.weight", (count, config.hidden_size)
    for expert in range(count):
        for name, shape in (("w1", rows), ("w3", rows), ("w2", rows[::-1])):
            yield f"{prefix}experts.{expert}.{name}.weight", shape


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
