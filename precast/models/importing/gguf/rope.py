"""Rotary embedding as a GGUF file describes it, in the words of ``config.json``."""

from typing import Any, Final

import numpy as np

from precast.errors import UnsupportedArchitecture
from precast.models.importing.gguf.header import GgufFile
from precast.models.importing.gguf.metadata import Metadata, Sizes
from precast.models.rope import RopeConfig

FREQUENCIES: Final = "rope_freqs.weight"
"""Factors that frequencies are divided by: so Llama 3's scaling is written."""
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
    for key in data.file.fields:
        if key.startswith(prefix) and key.removeprefix(prefix) not in _KEYS:
            raise UnsupportedArchitecture(f"{path}: {ascii(key)[1:-1]} is not supported")
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
    entry = file.tensors[FREQUENCIES]
    if entry.shape != (head_dim // 2,) or entry.type.name != "F32":
        raise UnsupportedArchitecture(
            f"{file.path}: {FREQUENCIES} has shape {entry.shape} and type {entry.type.name}"
        )
    factors = file.rows(FREQUENCIES, 0, 1).view("<f4")[0].astype(np.float64)
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
