"""What a model folder's ``config.json`` says, checked and by our names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SkipValidation,
    ValidationError,
    model_validator,
)

from precast.errors import ModelCorrupt, ModelNotFound, UnsupportedArchitecture
from precast.models.end_tokens import end_tokens
from precast.models.gguf_index import has_index, read_index
from precast.models.json_file import read_object
from precast.models.options import ExpertOptions, LayerPlan, Options, read_options
from precast.models.precision import Quantization
from precast.models.quantized.recognise import scheme_of
from precast.models.quantized.scheme import Scheme
from precast.models.rope import RopeConfig
from precast.ops.gguf_types import GgufType

ARCHITECTURES = {
    "Exaone4ForCausalLM": "exaone4",
    "Gemma3ForCausalLM": "gemma3",
    "Glm4ForCausalLM": "glm4",
    "GlmForCausalLM": "glm4",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "Olmo2ForCausalLM": "olmo2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Hugging Face class names and the module in ``precast.models`` that implements each."""
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "exaone4": {"sliding_window": 4096},
    "glm4": {"head_dim": 128},
    "gpt_oss": {"head_dim": 64, "sliding_window": 128},
    "gemma3": {
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "mistral": {"sliding_window": 4096},
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True},
}
"""What a ``config.json`` means that leaves an entry out, where architectures differ in it."""
MAX_LAYERS: Final = 1024
_MAX_SIZE: Final = 1 << 24
"""Of a matrix' side, and of positions: what is beyond is a mistake, and would take for ever."""
_COUNTS: Final = ("num_hidden_layers", "num_attention_heads", "hidden_size")
"""Entries that are calculated with before pydantic sees them."""


class ModelConfig(BaseModel):
    """Shapes and constants of one model, over all ranks."""

    model_config = ConfigDict(
        frozen=True, protected_namespaces=(), arbitrary_types_allowed=True, allow_inf_nan=False
    )

    architecture: str
    hidden_size: int = Field(gt=0, le=_MAX_SIZE)
    layers: tuple[LayerPlan, ...] = Field(min_length=1, max_length=MAX_LAYERS)
    q_heads: int = Field(gt=0, le=_MAX_SIZE)
    kv_heads: int = Field(gt=0, le=_MAX_SIZE)
    head_dim: int = Field(gt=0, le=1024)
    intermediate_size: int = Field(gt=0, le=_MAX_SIZE)
    """Columns of a dense MLP."""
    expert_size: int = Field(default=0, ge=0, le=_MAX_SIZE)
    """Columns of an expert; 0: the model has none."""
    shared_size: int = Field(default=0, ge=0, le=_MAX_SIZE)
    """Columns of an expert that all tokens go through; 0: the model has none."""
    vocab_size: int = Field(gt=0, le=_MAX_SIZE)
    rms_norm_eps: float = Field(gt=0)
    ropes: tuple[RopeConfig, ...]
    options: Options
    """What only this architecture has; sizes in it are those of the whole model."""
    tie_word_embeddings: bool
    max_position_embeddings: int = Field(gt=0, le=_MAX_SIZE)
    eos_token_ids: tuple[int, ...]
    scheme: SkipValidation[Scheme | None] = None
    """How linears are quantised that don't come as floats."""
    file_types: SkipValidation[Mapping[str, GgufType] | None] = None
    """The tensors' types in the folder's GGUF file, if it has one."""

    @property
    def own_quantization(self) -> Quantization | None:
        """The format in which quantised linears keep what they have; None: there are none."""
        if self.file_types is not None:
            return "file"
        return self.scheme.quantization if self.scheme is not None else None

    @property
    def has_own_types(self) -> bool:
        """Whether tensors have types of their own that can be kept side by side."""
        return self.own_quantization == "file"

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def rotary_dim(self) -> int:
        return self.options.rotary_dim or self.head_dim

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.q_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"head_dim={self.rotary_dim} is odd: rotary embedding needs pairs")
        if self.rotary_dim > self.head_dim:
            raise ValueError(f"{self.rotary_dim} of {self.head_dim} features can't be rotated")
        for rope in self.ropes:
            rope.check(self.rotary_dim)
        return self


def load_config(folder: Path) -> ModelConfig:
    """Reads ``folder/config.json``, and what other files say about the end of an answer.

    Raises ModelNotFound, ModelCorrupt or UnsupportedArchitecture, each with one line that says why.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"no model at {folder}: config.json is missing")
    raw = read_object(path)
    name = _class_name(path, raw)
    scheme = scheme_of(folder, raw)
    try:
        config = _parse(ARCHITECTURES[name], raw, folder)
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{path}: {name}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelCorrupt(f"{path}: {_one_line(error)}") from error
    return config.model_copy(update={"scheme": scheme, "file_types": _file_types(folder)})


def _file_types(folder: Path) -> dict[str, GgufType] | None:
    if not has_index(folder):
        return None
    return {name: tensor.type for name, tensor in read_index(folder).items()}


def _class_name(path: Path, raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures") or ["(none)"]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        shown = ascii(name)[:80].strip("'")
        raise UnsupportedArchitecture(f"{path}: architecture {shown} is not one of: {known}")
    return name


def _parse(architecture: str, raw: dict[str, Any], folder: Path) -> ModelConfig:
    raw = _DEFAULTS.get(architecture, {}) | raw
    for name in _COUNTS:
        _check_count(name, raw[name], MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE)
    options, ropes, layers = read_options(architecture, raw)
    heads = raw["num_attention_heads"]
    config = ModelConfig(
        architecture=architecture,
        hidden_size=raw["hidden_size"],
        layers=layers,
        q_heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        expert_size=options.expert_size if isinstance(options, ExpertOptions) else 0,
        shared_size=getattr(options, "shared_size", 0),
        vocab_size=raw["vocab_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        ropes=ropes,
        options=options,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=raw["max_position_embeddings"],
        eos_token_ids=(),
    )
    ends = end_tokens(folder, raw, config.vocab_size)
    return config.model_copy(update={"eos_token_ids": ends})


def _check_count(name: str, value: Any, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ValueError(f"{name}: {ascii(value)[:40]} is not a number from 1 to {most}")


def _one_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        given = "" if isinstance(first["input"], dict) else f" (it is {ascii(first['input'])[:40]})"
        return f"{'.'.join(map(str, first['loc'])) or 'config'}: {first['msg']}{given}"
    return (str(error).splitlines() or [type(error).__name__])[0]
