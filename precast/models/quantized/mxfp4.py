"""MXFP4, as gpt-oss has its experts: 4-bit floats, two in a byte, with a power of two for each 32
inputs. All experts of a layer are in one tensor.

Twice a value is a whole number from -12 to 12, so q8_0 holds them exactly.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from precast.errors import ModelCorrupt
from precast.models.precision import Quantization
from precast.models.quantized.scheme import Files, Scheme, Stored
from precast.ops.layout import GROUP

if TYPE_CHECKING:
    from precast.ops.scaled import ScaledWeight

_TWICE: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""What each of the 16 values stands for, times two."""
_BIAS: Final = 128
"""Of a scale's exponent, and one for the factor two."""


@dataclass(frozen=True, kw_only=True)
class Mxfp4:
    quantization: Quantization = "q8_0"
    loss: str = "layers that are not quantised: rounded to 8 bits for each 32 inputs"

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        return f"{module}_blocks" in names

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        """``shape``: experts, inputs, outputs."""
        del names
        experts, inputs, outputs = shape
        groups = -(-inputs // GROUP)
        return {
            f"{module}_blocks": Stored((experts, outputs, groups, GROUP // 2), ("U8",)),
            f"{module}_scales": Stored((experts, outputs, groups), ("U8",)),
        }

    def is_extra(self, name: str) -> bool:
        del name
        return False

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        raise ModelCorrupt(f"{module}: only experts can be of mxfp4")

    def expert(
        self, files: Files, module: str, index: int, shape: tuple[int, int, int]
    ) -> "ScaledWeight":
        """One expert's weights, [outputs, inputs]."""
        import torch

        from precast.ops.scaled import ScaledWeight

        stored = self.tensors(module, shape, ())
        blocks = files.get(f"{module}_blocks", stored[f"{module}_blocks"].shape)[index]
        exponents = files.get(f"{module}_scales", stored[f"{module}_scales"].shape)[index]
        if bool((exponents == 255).any()):
            raise ModelCorrupt(f"{module}_scales: a scale is not finite")
        table = torch.tensor(_TWICE, dtype=torch.int8)
        halves = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)
        values = table[halves[:, : shape[1]].int()]
        scales = torch.ldexp(torch.ones(1), exponents.int() - _BIAS)
        return ScaledWeight(values=values, scales=scales, group=GROUP, bits=8)


def read(settings: Mapping[str, Any]) -> Scheme:
    """Out of a ``quantization_config``."""
    del settings
    return Mxfp4()
