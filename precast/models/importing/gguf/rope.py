"""Rotary embedding as a GGUF file describes it, in the words of ``config.json``."""

from typing import Any, Final

import numpy as np

from precast.errors import ModelCorrupt, UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.metadata import Metadata, Sizes
from precast.models.rope import RopeConfig

FREQUENCIES: Final = "rope_freqs.weight"
"""Factors that frequencies are divided by: so Llama 3's scaling is written."""
LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
"""Longrope's; the file says of it which context the model began with, and the amplitude."""
_LLAMA3: Final = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What all of Llama 3.1 to 3.3 have; the file holds the outcome only."""
_PREFIX: Final = "rope.scaling."
_YARN: Final = {
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_KEYS: Final = {"type", "factor", "original_context_length", "finetuned", "attn_factor", *_YARN}


def read_rope(data: Metadata, sizes: Sizes, *, base: float = 10000.0) -> dict[str, Any]:
    """``rope_parameters``; ``base``: where the file has none. Raises ``UnsupportedArchitecture``
    for a scaling that we lack."""
    file = data.file
    theta = {"rope_theta": shortest(data.number("rope.freq_base", base))}
    if LONG_FACTORS in file.tensors or SHORT_FACTORS in file.tensors:
        return theta | _longrope(data, sizes)
    scaling = _scaling(data)
    if FREQUENCIES not in file.tensors:
        return theta | scaling
    if scaling["rope_type"] != "default":
        raise UnsupportedArchitecture(
            f"{file.path}: both {data.key(_PREFIX)}type and {FREQUENCIES} are not supported"
        )
    return theta | _of_factors(file, sizes.head_dim, theta["rope_theta"])


def _scaling(data: Metadata) -> dict[str, Any]:
    path, prefix = data.file.path, data.key(_PREFIX)
    _check_scaling_keys(data)
    old = data.number("rope.scale_linear", 1.0)
    kind = data.text(f"{_PREFIX}type", "linear" if old != 1.0 else "none")
    factor = data.number(f"{_PREFIX}factor", old)
    attention = data.number(f"{_PREFIX}attn_factor", 1.0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        found: dict[str, Any] = {"rope_type": "default"}
    elif kind == "linear":
        found = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        return _yarn(data, factor, attention)
    else:
        raise UnsupportedArchitecture(
            f"{path}: {prefix}type = {kind!a} is not one of: none, linear, yarn"
        )
    if attention != 1.0:
        raise UnsupportedArchitecture(f"{path}: {prefix}attn_factor without yarn")
    return found


def _check_scaling_keys(data: Metadata) -> None:
    prefix = data.key(_PREFIX)
    for key in data.file.fields:
        if key.startswith(prefix) and key.removeprefix(prefix) not in _KEYS:
            raise UnsupportedArchitecture(f"{data.file.path}: {ascii(key)[1:-1]} is not supported")


def _longrope(data: Metadata, sizes: Sizes) -> dict[str, Any]:
    _check_scaling_keys(data)
    if (kind := data.text(f"{_PREFIX}type", "longrope")) != "longrope":
        raise UnsupportedArchitecture(
            f"{data.file.path}: {data.key(_PREFIX)}type = {kind!a} with {LONG_FACTORS}"
        )
    first, length = (
        data.positive(f"{_PREFIX}original_context_length"),
        data.positive("context_length"),
    )
    factors = {"long_factor": LONG_FACTORS, "short_factor": SHORT_FACTORS}
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "original_max_position_embeddings": first,
        "factor": length / first,
    }
    for ours, theirs in factors.items():
        values = _factors(data.file, theirs, sizes.rotary_dim)
        found[ours] = [shortest(float(value)) for value in values]
    if data.has(f"{_PREFIX}attn_factor"):
        found["attention_factor"] = data.number(f"{_PREFIX}attn_factor")
    return found


def _factors(file: GgufFile, name: str, rotary_dim: int) -> np.ndarray[Any, Any]:
    """float64 [rotary_dim / 2]"""
    entry = file.tensors.get(name)
    if entry is None:
        raise ModelCorrupt(f"{file.path}: tensor {name} is missing")
    if entry.shape != (rotary_dim // 2,) or entry.type.name != "F32":
        raise UnsupportedArchitecture(
            f"{file.path}: {name} has shape {entry.shape} and type {entry.type.name}"
        )
    values: np.ndarray[Any, Any] = file.rows(name, 0, 1).view("<f4")[0].astype(np.float64)
    return values


def _yarn(data: Metadata, factor: float, attention: float) -> dict[str, Any]:
    original = data.integer(f"{_PREFIX}original_context_length", 0)
    length = data.integer("context_length")
    given = {
        ours: data.number(_PREFIX + theirs)
        for theirs, ours in _YARN.items()
        if data.has(_PREFIX + theirs)
    }
    plain: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or length,
        **given,
    }
    if attention == 1.0:
        return plain
    amplitude = RopeConfig(**plain).amplitude()
    return plain | {"attention_factor": attention * amplitude}


def _of_factors(file: GgufFile, head_dim: int, theta: float) -> dict[str, Any]:
    """Llama 3's scaling with the factor that the largest of the factors is."""
    factors = _factors(file, FREQUENCIES, head_dim)
    if np.all(factors == 1.0):
        return {"rope_type": "default"}
    guess: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": shortest(float(factors.max())),
        **_LLAMA3,
    }
    plain = RopeConfig(rope_theta=theta).inverse_frequencies(head_dim)
    scaled = RopeConfig(rope_theta=theta, **guess).inverse_frequencies(head_dim)
    expected = np.array(plain) / np.array(scaled)
    if not np.allclose(factors, expected, rtol=1e-5, atol=0):
        raise UnsupportedArchitecture(
            f"{file.path}: {FREQUENCIES} is not Llama 3's scaling, the only one supported so"
        )
    return guess


def shortest(value: float) -> float:
    """A float32 as the decimal number that it stands for."""
    return float(str(np.float32(value)))
