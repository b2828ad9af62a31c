"""What a model folder's ``config.json`` says, checked and by our names."""

import json
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from precast.errors import ModelCorrupt, ModelNotFound, UnsupportedArchitecture
from precast.models.options import LayerPlan, Options, Qwen3MoeOptions, read_options
from precast.models.rope import RopeConfig

ARCHITECTURES = {
    "Gemma3ForCausalLM": "gemma3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "SmolLM3ForCausalLM": "smollm3",
}
"""Hugging Face class names and the module in ``precast.models`` that implements each."""
_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "gemma3": {"head_dim": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 128},
    "smollm3": {"tie_word_embeddings": True},
}
"""What a ``config.json`` means that leaves an entry out, where architectures differ in it."""


class ModelConfig(BaseModel):
    """Shapes and constants of one model, over all ranks."""

    model_config = ConfigDict(frozen=True, protected_namespaces=(), arbitrary_types_allowed=True)

    architecture: str
    hidden_size: int = Field(gt=0)
    layers: tuple[LayerPlan, ...] = Field(min_length=1, max_length=1024)
    q_heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, le=1024)
    intermediate_size: int = Field(gt=0)
    """Columns of a dense MLP."""
    expert_size: int = Field(default=0, ge=0)
    """Columns of an expert; 0: the model has none."""
    vocab_size: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    ropes: tuple[RopeConfig, ...]
    options: Options
    """What only this architecture has; sizes in it are those of the whole model."""
    tie_word_embeddings: bool
    max_position_embeddings: int = Field(gt=0)
    eos_token_ids: tuple[int, ...]

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
        return self


def load_config(folder: Path) -> ModelConfig:
    """Reads ``folder/config.json`` (and the end-of-sequence ids of ``generation_config.json``).

    Raises ModelNotFound, ModelCorrupt or UnsupportedArchitecture, each with one line that says why.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFound(f"no model at {folder}: config.json is missing")
    raw = _read_json(path)
    name = (raw.get("architectures") or ["(none)"])[0]
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedArchitecture(f"{path}: architecture {name} is not one of: {known}")
    try:
        return _parse(ARCHITECTURES[name], raw, _generation_eos(folder))
    except UnsupportedArchitecture as error:
        raise UnsupportedArchitecture(f"{path}: {name}: {error}") from None
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ModelCorrupt(f"{path}: {_one_line(error)}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelCorrupt(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        raise ModelCorrupt(f"{path}: expected a JSON object")
    return raw


def _generation_eos(folder: Path) -> Any:
    path = folder / "generation_config.json"
    return _read_json(path).get("eos_token_id") if path.is_file() else None


def _parse(architecture: str, raw: dict[str, Any], generation_eos: Any) -> ModelConfig:
    raw = _DEFAULTS.get(architecture, {}) | raw
    options, ropes, layers = read_options(architecture, raw)
    heads = raw["num_attention_heads"]
    eos = generation_eos if generation_eos is not None else raw.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        hidden_size=raw["hidden_size"],
        layers=layers,
        q_heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        expert_size=options.expert_size if isinstance(options, Qwen3MoeOptions) else 0,
        vocab_size=raw["vocab_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        ropes=ropes,
        options=options,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=raw["max_position_embeddings"],
        eos_token_ids=_ids(eos),
    )


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(int(v) for v in value)


def _one_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'config'}: {first['msg']}"
    return str(error).splitlines()[0]
