"""The tensors that a model of each architecture has, by name, from its configuration alone.

Needs no torch: an import and a start look here before anything large is read. A test holds it
against what the architectures' loaders ask for.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from precast.models.config import ModelConfig
from precast.models.options import Kind, Qwen3MoeOptions

Shapes = Iterator[tuple[str, tuple[int, ...]]]

_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
_GEMMA_NORMS: Final = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_WITH_QK_NORMS: Final = ("gemma3", "qwen3", "qwen3_moe")


def expected_tensors(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Shape of each tensor."""
    return dict(_all(config))


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
    for norm in _GEMMA_NORMS if config.architecture == "gemma3" else _NORMS:
        yield f"{norm}.weight", (config.hidden_size,)
    yield from _attention(config)
    if isinstance(config.options, Qwen3MoeOptions) and kind == "moe":
        yield from _experts(config, config.options.experts)
    else:
        bias = bool(getattr(config.options, "mlp_bias", False))
        yield from _mlp(config, "mlp.", config.intermediate_size, bias)


def _attention(config: ModelConfig) -> Shapes:
    q, kv = config.q_heads * config.head_dim, config.kv_heads * config.head_dim
    bias = bool(getattr(config.options, "attention_bias", False))
    qkv_bias = bias or config.architecture == "qwen2"
    fused = config.architecture == "phi3"
    rows = {"qkv": q + 2 * kv} if fused else {"q": q, "k": kv, "v": kv}
    for name, size in rows.items():
        yield from _linear(f"self_attn.{name}_proj", size, config.hidden_size, qkv_bias)
    yield from _linear("self_attn.o_proj", config.hidden_size, q, bias)
    if config.architecture in _WITH_QK_NORMS:
        for name in ("q_norm", "k_norm"):
            yield f"self_attn.{name}.weight", (config.head_dim,)


def _mlp(config: ModelConfig, prefix: str, size: int, bias: bool = False) -> Shapes:
    fused = config.architecture == "phi3"
    rows = {"gate_up": 2 * size} if fused else {"gate": size, "up": size}
    for name, count in rows.items():
        yield from _linear(f"{prefix}{name}_proj", count, config.hidden_size, bias)
    yield from _linear(f"{prefix}down_proj", config.hidden_size, size, bias)


def _experts(config: ModelConfig, count: int) -> Shapes:
    yield "mlp.gate.weight", (count, config.hidden_size)
    for expert in range(count):
        yield from _mlp(config, f"mlp.experts.{expert}.", config.expert_size)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)
