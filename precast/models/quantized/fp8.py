"""FP8 (e4m3): 8-bit floats with a scale for the tensor, a row, or a block of rows and inputs.

No kernel takes them. By default they are rounded to q8_0, 8 bits with a scale for each 32 inputs:
that is off by 1/254 of the largest of these, where FP8 itself has rounded each value by up to 2^-4
of it. bf16 (``quantization = none``) rounds by 2^-9 of each value and reads twice as much.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from precast.models.precision import Quantization
from precast.models.quantized.scheme import SCALES, Files, Scheme, Stored, block_of, one_of

if TYPE_CHECKING:
    from torch import Tensor

    from precast.ops.scaled import ScaledWeight

_EXTRAS: Final = ("input_scale", "activation_scale", "k_scale", "v_scale", "output_scale")


@dataclass(frozen=True, kw_only=True)
class Fp8:
    block: tuple[int, int] | None
    """Rows and inputs that share a scale; None: see ``per_row``."""
    per_row: bool
    """A scale for each row; else one for all."""
    scales: tuple[str, ...] = ("weight_scale", "weight_scale_inv")
    """What the tensor of scales may be called."""
    extras: tuple[str, ...] = _EXTRAS
    quantization: Quantization = "q8_0"
    loss: str = "FP8: rounded to 8 bits for each 32 inputs"

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        return self._scale(module, names) in names

    def _scale(self, module: str, names: Collection[str]) -> str:
        found = (f"{module}.{scale}" for scale in self.scales)
        return next((name for name in found if name in names), f"{module}.{self.scales[0]}")

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        return {
            f"{module}.weight": Stored(shape, ("F8_E4M3",)),
            self._scale(module, names): Stored(self._scales(shape), SCALES),
        }

    def is_extra(self, name: str) -> bool:
        return name.rpartition(".")[2] in self.extras

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        from precast.models.quantized.words import finite
        from precast.ops.scaled import ScaledWeight

        name = self._scale(module, files.names)
        scales = self._by_row(finite(files.get(name, self._scales(shape)), name), shape[0])
        return ScaledWeight(
            values=files.get(f"{module}.weight", shape),
            scales=scales,
            group=None if self.block is None else self.block[1],
            bits=0,
        )

    def _scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.block is not None:
            rows, inputs = self.block
            return (-(-shape[0] // rows), -(-shape[1] // inputs))
        return (shape[0], 1) if self.per_row else (1,)

    def _by_row(self, scales: "Tensor", rows: int) -> "Tensor":
        if self.block is not None:
            return scales.repeat_interleave(self.block[0], dim=0)[:rows]
        return scales.reshape(-1, 1).expand(rows, -1)


def read(settings: Mapping[str, Any]) -> Scheme:
    """Out of a ``quantization_config``. Raises UnsupportedArchitecture."""
    one_of(settings, "fmt", "e4m3", "e4m3", "float8_e4m3fn")
    one_of(settings, "scale_fmt", None, None, "float")
    block = settings.get("weight_block_size")
    if block is None:
        return Fp8(block=None, per_row=False)
    return Fp8(block=block_of(block, "weight_block_size"), per_row=False)
