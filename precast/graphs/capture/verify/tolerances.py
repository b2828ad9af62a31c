"""How far a graph may be from eager: not at all with our own kernels, which give a token the same
bits in any step; with others', by the types that its factors name."""

from collections.abc import Mapping
from typing import Final

LINEAR_BOUNDS: Final = {
    "fp32": 3e-5,
    "bf16": 3e-5,
    "fp16": 3e-5,
    "int8": 3e-2,
    "q8_0": 3e-2,
    "q4_0": 3e-2,
    "q4_1": 3e-2,
    "file": 3e-2,
}
KV_BOUNDS: Final = {"fp32": 3e-5, "bf16": 1e-2, "int8": 2e-2}
EXACT_PROVIDERS: Final = ("native",)
"""Their kernels give a token the same bits whatever else is in its step."""
ROUNDING_BOUND: Final = 3e-2
ROUNDING_PROVIDERS: Final = ("sgl_kernel",)
"""Their kernels take activations in less than float32."""


def bound_of(factors: Mapping[str, str]) -> float:
    """Largest |graph - eager| / max |eager| of logits and cache entries: 0, or that of the loosest
    type in the step."""
    if factors["provider"] in EXACT_PROVIDERS:
        return 0.0
    return max(
        _linear(factors, "quantization"),
        _linear(factors, "head_quantization"),
        KV_BOUNDS[factors["kv_dtype"]],
        ROUNDING_BOUND if factors["provider"] in ROUNDING_PROVIDERS else 0.0,
    )


def _linear(factors: Mapping[str, str], name: str) -> float:
    quantization = factors[name]
    return LINEAR_BOUNDS[factors["weight_dtype"] if quantization == "none" else quantization]
