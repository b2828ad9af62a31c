"""AWQ, as AutoAWQ's ``gemm`` writes it: words of 4 bits along a linear's outputs, in an order of
their own, with zero points and scales a group of inputs."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from precast.models.quantized.scheme import (
    SCALES,
    Files,
    Integers,
    Scheme,
    Stored,
    group_size,
    groups_of,
    number,
    one_of,
)

if TYPE_CHECKING:
    from precast.ops.scaled import ScaledWeight

_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word each of eight neighbouring outputs is."""
_BITS: Final = 4


@dataclass(frozen=True, kw_only=True)
class Awq(Integers):
    bits: int = _BITS
    symmetric: bool = False

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        return f"{module}.qweight" in names

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        del names
        rows, inputs = shape
        groups, words = groups_of(inputs, self.group), -(-rows // len(_PLACES))
        return {
            f"{module}.qweight": Stored((inputs, words), ("I32",)),
            f"{module}.qzeros": Stored((groups, words), ("I32",)),
            f"{module}.scales": Stored((groups, rows), SCALES),
        }

    def is_extra(self, name: str) -> bool:
        del name
        return False

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        from precast.models.quantized.words import finite, unpacked
        from precast.ops.scaled import ScaledWeight

        stored = self.tensors(module, shape, ())
        words, zeros, scales = (
            files.get(f"{module}.{name}", stored[f"{module}.{name}"].shape)
            for name in ("qweight", "qzeros", "scales")
        )
        values, zeros = (
            unpacked(of, _BITS, by_rows=False, order=_PLACES)[:, : shape[0]].T.contiguous()
            for of in (words, zeros)
        )
        scales = finite(scales, f"{module}.scales").T.contiguous()
        return ScaledWeight(
            values=values, scales=scales, minima=-scales * zeros, group=self.group, bits=_BITS
        )


def read(settings: Mapping[str, Any]) -> Scheme:
    """Out of a ``quantization_config``, old spellings too. Raises UnsupportedArchitecture."""
    one_of({"bits": number(settings, "bits", "w_bit")}, "bits", _BITS, _BITS)
    for name in ("version", "format"):
        one_of(settings, name, "gemm", "gemm")
    return Awq(group=group_size(settings, "group_size", "q_group_size"))
