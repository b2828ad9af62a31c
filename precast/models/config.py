"""What a model folder's ``config.json`` says, checked and by our names."""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from precast.errors import ModelCorrupt, ModelNotFound, UnsupportedArchitecture

ARCHITECTURES = {"LlamaForCausalLM": "llama"}
"""Hugging Face class names and the module in ``precast.models`` that implements each."""

ROPE_TYPES = ("default", "linear", "llama3")


class RopeConfig(BaseModel):
    """Rotary embedding: base frequency and how it is scaled for long contexts."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> list[float]:
        """[head_dim / 2] angles a position, as transformers' ``ROPE_INIT_FUNCTIONS`` give them."""
        plain = [self.rope_theta ** -(i / head_dim) for i in range(0, head_dim, 2)]
        if self.rope_type == "linear":
            return [f / self.factor for f in plain]
        if self.rope_type == "llama3":
            return [self._llama3(f) for f in plain]
        return plain

    def _llama3(self, frequency: float) -> float:
        length = self.original_max_position_embeddings
        turns = length * frequency / (2 * math.pi)
        if turns < self.low_freq_factor:
            return frequency / self.factor
        if turns > self.high_freq_factor:
            return frequency
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / self.factor + smooth * frequency


class ModelConfig(BaseModel):
    """Shapes and constants of one model, over all ranks."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    architecture: str
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0, le=1024)
    q_heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0, le=1024)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    rms_norm_eps: float = Field(gt=0)
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int = Field(gt=0)
    eos_token_ids: tuple[int, ...]

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads={self.q_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd: rotary embedding needs pairs")
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
    except (KeyError, TypeError, ValueError, ValidationError) as error:
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
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={raw['hidden_act']} is not supported, only silu")
    rope = _parse_rope(raw)
    heads = raw["num_attention_heads"]
    eos = generation_eos if generation_eos is not None else raw.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        q_heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        intermediate_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope=rope,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        attention_bias=raw.get("attention_bias", False),
        mlp_bias=raw.get("mlp_bias", False),
        max_position_embeddings=raw["max_position_embeddings"],
        eos_token_ids=_ids(eos),
    )


def _parse_rope(raw: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters; before that it was rope_theta and rope_scaling.
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    settings.setdefault("rope_type", settings.get("type", "default"))
    settings.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if settings["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope_type={settings['rope_type']} is not one of {', '.join(ROPE_TYPES)}")
    return RopeConfig(**settings)


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
