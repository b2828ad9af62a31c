"""What sets an architecture apart within its ``config.json``: options that its graphs depend on,
the kinds of its layers, its ropes.

Needs no torch: the gateway and the leader read configurations too. Each architecture has a class of
options, which travels as one factor of the graph's key (``to_factor``), and a function that reads
it; what they mean is in the module of the same name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, Self, TypeVar

import msgspec

from precast.errors import InvalidRequest, UnsupportedArchitecture
from precast.models.rope import NO_ROPE, RopeConfig, parse_rope, rope_settings

Kind = Literal["full", "sliding", "dense", "moe"]
"""Kinds of layers: attention over all of the context or a window; with experts or without."""


class Options(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every architecture has."""

    kinds: tuple[Kind, ...] = ("full",)
    """Kinds of layers that the model has, sorted: each is captured once."""
    ropes: int = 1
    """Rotary tables; which one a layer uses is data."""
    rotary_dim: int = 0
    """Features of a head that are rotated, the first ones; 0: all."""

    def on_rank(self, expert_size: int) -> Self:
        """Options of a rank's shard."""
        del expert_size
        return self


class LlamaOptions(Options, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False
    mlp_bias: bool = False


class WindowOptions(Options, frozen=True, kw_only=True, omit_defaults=True):
    """Mistral, Qwen2 and Phi-3."""

    window: int = 0
    """Tokens that a "sliding" layer attends to, itself included."""


class Qwen3Options(WindowOptions, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False


class SmolLM3Options(WindowOptions, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False
    mlp_bias: bool = False


class Gemma3Options(WindowOptions, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False
    query_scale: float
    """Scores are multiplied by it."""
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0


class Qwen3MoeOptions(Options, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False
    window: int = 0
    """Of all layers; 0: none."""
    experts: int
    experts_per_token: int
    expert_size: int
    """Columns of one expert on this rank."""
    normalize: bool = False
    """Whether the weights of a token's experts are made to sum to one."""

    def on_rank(self, expert_size: int) -> Self:
        return msgspec.structs.replace(self, expert_size=expert_size)


class LayerPlan(NamedTuple):
    """Which captured layer and which rotary table a layer of the model uses."""

    kind: Kind
    rope: int = 0


class Reading(NamedTuple):
    """What was read out of a ``config.json`` beside the sizes that all have."""

    options: Options
    ropes: tuple[RopeConfig, ...]
    layers: tuple[LayerPlan, ...]


def to_factor(options: Options) -> str:
    """Canonical text: defaults are left out, names are sorted."""
    return msgspec.json.encode(options, order="sorted").decode()


def check_architecture(architecture: str) -> None:
    """Raises InvalidRequest for one that we lack."""
    if architecture not in OPTIONS:
        known = ", ".join(sorted(OPTIONS))
        raise InvalidRequest(f"architecture {architecture} is not one of: {known}")


def from_factor(architecture: str, text: str) -> Options:
    """Raises InvalidRequest for an architecture or options that we lack, or another spelling."""
    check_architecture(architecture)
    try:
        options = msgspec.json.decode(text, type=OPTIONS[architecture])
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"options {text}: {error}") from None
    if to_factor(options) != text:
        raise InvalidRequest(f"options {text}: write {to_factor(options)}")
    return options


def read_options(architecture: str, raw: Mapping[str, Any]) -> Reading:
    """Raises UnsupportedArchitecture for what we lack; KeyError, ValueError for what is wrong."""
    return _READERS[architecture](raw)


_O = TypeVar("_O", bound=Options)


def _reading(options: _O, ropes: tuple[RopeConfig, ...], layers: list[LayerPlan]) -> Reading:
    kinds = tuple(sorted({layer.kind for layer in layers}))
    complete = msgspec.structs.replace(options, kinds=kinds, ropes=len(ropes))
    return Reading(_checked(complete), ropes, tuple(layers))


def _checked(options: _O) -> _O:
    """Raises ValueError for entries of another type, or numbers that are none."""
    values = msgspec.to_builtins(options)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    try:
        return msgspec.convert(values, type(options))
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def _plain_rope(raw: Mapping[str, Any], theta: float = 10000.0) -> RopeConfig:
    return parse_rope(
        rope_settings(raw), raw.get("rope_theta", theta), raw.get("max_position_embeddings")
    )


def _require(raw: Mapping[str, Any], name: str, wanted: object) -> None:
    if raw.get(name, wanted) != wanted:
        raise UnsupportedArchitecture(f"{name}={raw[name]} is not supported, only {wanted}")


def _layer_kinds(raw: Mapping[str, Any], sliding: Callable[[int], bool]) -> list[Kind]:
    """The kinds that ``layer_types`` names, or else that ``sliding`` gives by index."""
    kinds: dict[str, Kind] = {"full_attention": "full", "sliding_attention": "sliding"}
    count = raw["num_hidden_layers"]
    if raw.get("layer_types") is None:
        return ["sliding" if sliding(index) else "full" for index in range(count)]
    unknown = sorted(set(raw["layer_types"]) - set(kinds))
    if unknown:
        raise UnsupportedArchitecture(
            f"layer_types: {unknown[0]} is not one of: {', '.join(kinds)}"
        )
    if len(raw["layer_types"]) < count:
        raise ValueError(f"layer_types has {len(raw['layer_types'])} entries for {count} layers")
    return [kinds[name] for name in raw["layer_types"][:count]]


def _llama(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    options = LlamaOptions(
        attention_bias=raw.get("attention_bias", False), mlp_bias=raw.get("mlp_bias", False)
    )
    return _reading(options, (_plain_rope(raw),), [LayerPlan("full")] * raw["num_hidden_layers"])


def _mistral(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    window = raw.get("sliding_window") or 0
    kind: Kind = "sliding" if window else "full"
    layers = [LayerPlan(kind)] * raw["num_hidden_layers"]
    return _reading(WindowOptions(window=window), (_plain_rope(raw),), layers)


def _phi3(raw: Mapping[str, Any]) -> Reading:
    settings = rope_settings(raw)
    # Phi-3's "su" and "yarn" are early names of longrope.
    name = settings.get("rope_type", settings.get("type", "default"))
    if name != "default":
        raise UnsupportedArchitecture(f"rope_type={name} of Phi-3 (longrope) is not supported")
    reading = _mistral(raw)
    head_dim = raw["hidden_size"] // raw["num_attention_heads"]
    part = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * part)
    if rotary_dim == head_dim:
        return reading
    options = msgspec.structs.replace(reading.options, rotary_dim=rotary_dim)
    return reading._replace(options=options)


def _qwen_kinds(raw: Mapping[str, Any]) -> tuple[list[Kind], int]:
    """Kinds of Qwen's layers and their window, 0 if no layer has one."""
    count = raw["num_hidden_layers"]
    window = (raw.get("sliding_window") or 0) if raw.get("use_sliding_window") else 0
    if not window:
        return ["full"] * count, 0
    first = raw.get("max_window_layers", 28)
    kinds = _layer_kinds(raw, lambda index: index >= first)
    return kinds, window if "sliding" in kinds else 0


def _qwen2(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    kinds, window = _qwen_kinds(raw)
    return _reading(
        WindowOptions(window=window), (_plain_rope(raw),), [LayerPlan(kind) for kind in kinds]
    )


def _qwen3(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    kinds, window = _qwen_kinds(raw)
    options = Qwen3Options(window=window, attention_bias=raw.get("attention_bias", False))
    return _reading(options, (_plain_rope(raw),), [LayerPlan(kind) for kind in kinds])


def _smollm3(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    count = raw["num_hidden_layers"]
    interval = raw.get("no_rope_layer_interval", 4)
    rotates = raw.get("no_rope_layers") or [(i + 1) % interval != 0 for i in range(count)]
    window = (raw.get("sliding_window") or 0) if raw.get("use_sliding_window") else 0
    kinds: list[Kind] = ["full"] * count
    if window:
        kinds = _layer_kinds(raw, lambda index: not rotates[index])
    options = SmolLM3Options(
        window=window if "sliding" in kinds else 0,
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
    )
    layers = [LayerPlan(kinds[index], 0 if rotates[index] else 1) for index in range(count)]
    return _reading(options, (_plain_rope(raw, 2000000.0), NO_ROPE), layers)


def _gemma3(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_activation", "gelu_pytorch_tanh")
    if raw.get("use_bidirectional_attention"):
        raise UnsupportedArchitecture("use_bidirectional_attention=true is not supported")
    pattern = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern", 6))
    kinds = _layer_kinds(raw, lambda index: (index + 1) % pattern != 0)
    options = Gemma3Options(
        window=raw.get("sliding_window") or 0 if "sliding" in kinds else 0,
        attention_bias=raw.get("attention_bias", False),
        query_scale=_query_scale(raw.get("query_pre_attn_scalar", 256)),
        attention_softcap=raw.get("attn_logit_softcapping") or 0.0,
        logit_softcap=raw.get("final_logit_softcapping") or 0.0,
    )
    layers = [LayerPlan(kind, 1 if kind == "sliding" else 0) for kind in kinds]
    return _reading(options, _gemma3_ropes(raw), layers)


def _query_scale(divisor: Any) -> float:
    value = float(divisor)
    if not value > 0:
        raise ValueError(f"query_pre_attn_scalar is {value}")
    return float(value**-0.5)


def _gemma3_ropes(raw: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Of full and of sliding layers."""
    given = raw.get("rope_parameters") or {}
    full = given.get("full_attention") or raw.get("rope_scaling")
    return (
        parse_rope(full, raw.get("rope_theta", 1e6), raw.get("max_position_embeddings")),
        parse_rope(given.get("sliding_attention"), raw.get("rope_local_base_freq", 1e4)),
    )


def _qwen3_moe(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    step, plain = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    # transformers 5 writes num_local_experts.
    experts = raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"]
    layers = [
        LayerPlan("moe" if index not in plain and (index + 1) % step == 0 else "dense")
        for index in range(raw["num_hidden_layers"])
    ]
    options = Qwen3MoeOptions(
        window=(raw.get("sliding_window") or 0) if raw.get("use_sliding_window") else 0,
        attention_bias=raw.get("attention_bias", False),
        experts=experts,
        experts_per_token=raw["num_experts_per_tok"],
        expert_size=raw["moe_intermediate_size"],
        normalize=raw.get("norm_topk_prob", False),
    )
    if not 0 < options.experts_per_token <= experts:
        raise ValueError(f"num_experts_per_tok={options.experts_per_token} of {experts} experts")
    return _reading(options, (_plain_rope(raw),), layers)


OPTIONS: Final[Mapping[str, type[Options]]] = {
    "gemma3": Gemma3Options,
    "llama": LlamaOptions,
    "mistral": WindowOptions,
    "phi3": WindowOptions,
    "qwen2": WindowOptions,
    "qwen3": Qwen3Options,
    "qwen3_moe": Qwen3MoeOptions,
    "smollm3": SmolLM3Options,
}
_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Reading]]] = {
    "gemma3": _gemma3,
    "llama": _llama,
    "mistral": _mistral,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
}
