"""Types of weights and cache, by the names that settings and graph factors use."""

from dataclasses import dataclass
from typing import Literal, TypeVar

WeightDtype = Literal["fp32", "bf16", "fp16"]
Quantization = Literal["none", "int8", "q8_0", "q4_0", "q4_1", "file"]
QuantizationSetting = Literal["auto", Quantization]
"""auto: a quantised checkpoint's own format, and q4_1 for one of floats."""
KvDtype = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True, kw_only=True)
class Precision:
    weight_dtype: WeightDtype = "fp32"
    """Of the embedding table, and of linears that are not quantised."""
    quantization: Quantization = "none"
    """Of the layers' linears; activations are quantised to 8 bits on the fly. int8: one scale for
    each output channel. q8_0, q4_0, q4_1: GGUF's groups of 32 with a scale, or a scale and a
    minimum. file: what a GGUF file has, each tensor as it has it."""
    head_quantization: Quantization = "none"
    """Of the output projection."""
    kv_dtype: KvDtype = "fp32"
    """Of keys and values in the cache."""


_Q = TypeVar("_Q", Quantization, QuantizationSetting)


def chosen_quantization(setting: QuantizationSetting, own: Quantization | None) -> Quantization:
    """What a setting means for a checkpoint; ``own``: the format that it comes in, if it is
    quantised."""
    return (own or "q4_1") if setting == "auto" else setting


def default_head_quantization(quantization: _Q) -> _Q:
    """What llama.cpp ships: 8 bits where the layers have 4, because the head costs most
    accuracy."""
    return "q8_0" if quantization in ("q4_0", "q4_1") else quantization


def default_kv_dtype(weight_dtype: WeightDtype, quantization: QuantizationSetting) -> KvDtype:
    """fp32 where the weights are fp32, so that results are exact; else bf16, which costs no
    accuracy that shows (docs/fidelity.md), half of the memory and half of attention's reads."""
    return "fp32" if weight_dtype == "fp32" and quantization == "none" else "bf16"


def cached_head_bytes(kv_dtype: KvDtype, head_dim: int) -> int:
    """What a head's key, or its value, of one token takes in the cache."""
    return {"fp32": 4 * head_dim, "bf16": 2 * head_dim, "int8": head_dim + 4}[kv_dtype]


def row_bytes(kind: str, columns: int) -> int:
    """What a row of packed weights takes: of a WeightDtype or a Quantization but "none"."""
    groups = -(-columns // 64) * 2  # of 32; an even number of them
    return {
        "fp32": 4 * columns,
        "bf16": 2 * columns,
        "fp16": 2 * columns,
        "int8": -(-columns // 4) * 4 + 4,
        "q8_0": groups * 34,
        "q4_0": groups * 18,
        "q4_1": groups * 20,
    }[kind]
