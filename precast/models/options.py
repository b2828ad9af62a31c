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

    def on_rank(self, expert_size: int, shared_size: int) -> Self:
        """Options of a rank's shard."""
        del expert_size, shared_size
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


class GraniteOptions(LlamaOptions, frozen=True, kw_only=True, omit_defaults=True):
    query_scale: float
    """Scores are multiplied by it."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What attention and MLP add is multiplied by it."""
    logit_divisor: float = 1.0


class Glm4Options(Options, frozen=True, kw_only=True, omit_defaults=True):
    qkv_bias: bool = False
    out_norms: bool = False
    """Whether what comes out of attention and MLP is normed."""


class Olmo2Options(Options, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False


class ExpertOptions(WindowOptions, frozen=True, kw_only=True, omit_defaults=True):
    """Mixtral, and what others have in common with it."""

    experts: int
    experts_per_token: int
    expert_size: int
    """Columns of one expert on this rank."""
    normalize: bool = False
    """Whether the weights of a token's experts are made to sum to one."""

    def on_rank(self, expert_size: int, shared_size: int) -> Self:
        del shared_size
        return msgspec.structs.replace(self, expert_size=expert_size)


class Qwen2MoeOptions(ExpertOptions, frozen=True, kw_only=True, omit_defaults=True):
    qkv_bias: bool = True
    shared_size: int
    """Columns of the expert that all tokens go through, on this rank."""

    def on_rank(self, expert_size: int, shared_size: int) -> Self:
        return msgspec.structs.replace(self, expert_size=expert_size, shared_size=shared_size)


class GptOssOptions(ExpertOptions, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = True
    limit: float
    """Of what experts' gates and ups are."""


class Qwen3MoeOptions(ExpertOptions, frozen=True, kw_only=True, omit_defaults=True):
    attention_bias: bool = False


def experts_of(options: Options) -> int:
    """How many a layer has to choose among; 0: none."""
    return options.experts if isinstance(options, ExpertOptions) else 0


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
_E = TypeVar("_E", bound=ExpertOptions)


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


def _exaone4(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    window, pattern = raw.get("sliding_window") or 0, raw.get("sliding_window_pattern", 4)
    every = len(pattern) if isinstance(pattern, str) else pattern or 1
    kinds = _layer_kinds(raw, lambda index: bool(window) and (index + 1) % every != 0)
    layers = [LayerPlan(kind, int(bool(window) and kind == "full")) for kind in kinds]
    ropes = (_plain_rope(raw), NO_ROPE) if window else (_plain_rope(raw),)
    return _reading(WindowOptions(window=window if "sliding" in kinds else 0), ropes, layers)


def _glm(raw: Mapping[str, Any], out_norms: bool = False) -> Reading:
    _require(raw, "hidden_act", "silu")
    options = Glm4Options(qkv_bias=raw.get("attention_bias", True), out_norms=out_norms)
    layers = [LayerPlan("full")] * raw["num_hidden_layers"]
    reading = _reading(options, (_plain_rope(raw),), layers)
    return _partly_rotated(reading, raw, rope_settings(raw), 0.5)


def _glm4(raw: Mapping[str, Any]) -> Reading:
    """Both of the architectures that are called so."""
    return _glm(raw, out_norms="Glm4ForCausalLM" in (raw.get("architectures") or ()))


def _granite(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    options = GraniteOptions(
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        query_scale=float(raw.get("attention_multiplier", 1.0)),
        embedding_scale=float(raw.get("embedding_multiplier", 1.0)),
        residual_scale=float(raw.get("residual_multiplier", 1.0)),
        logit_divisor=float(raw.get("logits_scaling", 1.0)),
    )
    if not options.logit_divisor > 0:
        raise ValueError(f"logits_scaling is {options.logit_divisor}")
    return _reading(options, (_plain_rope(raw),), [LayerPlan("full")] * raw["num_hidden_layers"])


def _olmo2(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    options = Olmo2Options(attention_bias=raw.get("attention_bias", False))
    return _reading(options, (_plain_rope(raw),), [LayerPlan("full")] * raw["num_hidden_layers"])


def _mistral(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    window = raw.get("sliding_window") or 0
    kind: Kind = "sliding" if window else "full"
    layers = [LayerPlan(kind)] * raw["num_hidden_layers"]
    return _reading(WindowOptions(window=window), (_plain_rope(raw),), layers)


def _phi3(raw: Mapping[str, Any]) -> Reading:
    settings = _phi3_rope(raw)
    reading = _mistral({**raw, "rope_parameters": settings})
    return _partly_rotated(reading, raw, settings)


def _phi3_rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Phi's early names of longrope are "su" and "yarn"; the context that the model began with is
    an entry of its own."""
    settings = rope_settings(raw)
    name = settings.get("rope_type", settings.get("type", "default"))
    if name in ("su", "yarn") and "long_factor" in settings:
        settings["rope_type"] = name = "longrope"
    if name == "longrope" and settings.get("factor") is None:
        first = raw.get("original_max_position_embeddings")
        first = settings.get("original_max_position_embeddings") or first
        if not first:
            raise ValueError("longrope needs original_max_position_embeddings")
        settings["original_max_position_embeddings"] = first
        settings["factor"] = raw["max_position_embeddings"] / first
    return settings


def _partly_rotated(
    reading: Reading, raw: Mapping[str, Any], settings: Mapping[str, Any], default: float = 1.0
) -> Reading:
    """With only the first of a head's features rotated, as ``partial_rotary_factor`` says."""
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    part = settings.get("partial_rotary_factor", raw.get("partial_rotary_factor", default))
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


def _mixtral(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    options = ExpertOptions(
        window=raw.get("sliding_window") or 0,
        experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        expert_size=raw["intermediate_size"],
        normalize=True,
    )
    _check_experts(options)
    return _reading(
        options, (_plain_rope(raw, 1e6),), [LayerPlan("moe")] * raw["num_hidden_layers"]
    )


_MAX_EXPERTS: Final = 1 << 14


def _check_experts(options: ExpertOptions) -> None:
    if options.experts > _MAX_EXPERTS:
        raise ValueError(f"{options.experts} experts, more than {_MAX_EXPERTS}")
    if not 0 < options.experts_per_token <= options.experts:
        raise ValueError(
            f"num_experts_per_tok={options.experts_per_token} of {options.experts} experts"
        )


def _gpt_oss(raw: Mapping[str, Any]) -> Reading:
    _require(raw, "hidden_act", "silu")
    _require(raw, "swiglu_alpha", 1.702)
    kinds = _layer_kinds(raw, lambda index: index % 2 == 0)
    options = GptOssOptions(
        window=(raw.get("sliding_window") or 0) if "sliding" in kinds else 0,
        experts=raw["num_local_experts"],
        experts_per_token=raw.get("num_experts_per_tok") or raw["experts_per_token"],
        expert_size=raw["intermediate_size"],
        normalize=True,
        attention_bias=raw.get("attention_bias", True),
        limit=float(raw.get("swiglu_limit", 7.0)),
    )
    _check_experts(options)
    if not options.limit > 0:
        raise ValueError(f"swiglu_limit is {options.limit}")
    rope = _plain_rope(raw, 150000.0)
    return _reading(options, (rope,), [LayerPlan(kind) for kind in kinds])


def _qwen_experts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What Qwen's mixtures have in common."""
    return {
        "window": (raw.get("sliding_window") or 0) if raw.get("use_sliding_window") else 0,
        # transformers 5 writes num_local_experts.
        "experts": raw["num_local_experts"] if "num_local_experts" in raw else raw["num_experts"],
        "experts_per_token": raw["num_experts_per_tok"],
        "expert_size": raw["moe_intermediate_size"],
        "normalize": raw.get("norm_topk_prob", False),
    }


def _qwen_mixture(raw: Mapping[str, Any], options: _E) -> Reading:
    _require(raw, "hidden_act", "silu")
    _check_experts(options)
    step, plain = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or ()
    layers = [
        LayerPlan("moe" if index not in plain and (index + 1) % step == 0 else "dense")
        for index in range(raw["num_hidden_layers"])
    ]
    return _reading(options, (_plain_rope(raw),), layers)


def _qwen2_moe(raw: Mapping[str, Any]) -> Reading:
    if raw.get("use_sliding_window"):
        raise UnsupportedArchitecture("use_sliding_window=true is not supported")
    options = Qwen2MoeOptions(
        **_qwen_experts(raw),
        qkv_bias=raw.get("qkv_bias", True),
        shared_size=raw["shared_expert_intermediate_size"],
    )
    return _qwen_mixture(raw, options)


def _qwen3_moe(raw: Mapping[str, Any]) -> Reading:
    options = Qwen3MoeOptions(**_qwen_experts(raw), attention_bias=raw.get("attention_bias", False))
    return _qwen_mixture(raw, options)


OPTIONS: Final[Mapping[str, type[Options]]] = {
    "exaone4": WindowOptions,
    "gemma3": Gemma3Options,
    "glm4": Glm4Options,
    "gpt_oss": GptOssOptions,
    "granite": GraniteOptions,
    "llama": LlamaOptions,
    "mistral": WindowOptions,
    "mixtral": ExpertOptions,
    "olmo2": Olmo2Options,
    "phi3": WindowOptions,
    "qwen2": WindowOptions,
    "qwen2_moe": Qwen2MoeOptions,
    "qwen3": Qwen3Options,
    "qwen3_moe": Qwen3MoeOptions,
    "smollm3": SmolLM3Options,
}
_READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Reading]]] = {
    "exaone4": _exaone4,
    "gemma3": _gemma3,
    "glm4": _glm4,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
}
