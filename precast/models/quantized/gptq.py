"""GPTQ: words of 2, 4 or 8 bits along a linear's inputs, zero points and scales a group, and for
each input the group that it belongs to (act-order puts them in any order)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from precast.errors import ModelCorrupt, UnsupportedArchitecture
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

_BITS: Final = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class Gptq(Integers):
    zeros_less_one: bool
    """Whether zero points are stored less one, as in all files but those of ``gptq_v2``."""

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        return f"{module}.qweight" in names

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        rows, inputs = shape
        each, groups = 32 // self.bits, groups_of(inputs, self.group)
        found = {
            f"{module}.qweight": Stored((-(-inputs // each), rows), ("I32",)),
            f"{module}.qzeros": Stored((groups, -(-rows // each)), ("I32",)),
            f"{module}.scales": Stored((groups, rows), SCALES),
        }
        if not self.in_order or f"{module}.g_idx" in names:
            found[f"{module}.g_idx"] = Stored((inputs,), ("I32",))
        return found

    def is_extra(self, name: str) -> bool:
        del name
        return False

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        from precast.models.quantized.words import by_input, finite, signed, unpacked
        from precast.ops.scaled import ScaledWeight

        stored = self.tensors(module, shape, ())
        words, zeros, scales = (
            files.get(f"{module}.{name}", stored[f"{module}.{name}"].shape)
            for name in ("qweight", "qzeros", "scales")
        )
        values = unpacked(words, self.bits, by_rows=True)[: shape[1]].T.contiguous()
        if self.zeros_less_one:
            # Of words and not of numbers: one that was 0 has borrowed from the next.
            zeros = zeros + sum(1 << place for place in range(0, 32, self.bits))
        zeros = unpacked(zeros, self.bits, by_rows=False)[:, : shape[0]].T
        scales, minima = finite(scales, f"{module}.scales").T.contiguous(), None
        if not self.symmetric:
            minima = -scales * zeros
        elif bool((zeros != 1 << (self.bits - 1)).any()):
            raise ModelCorrupt(f"{module}.qzeros: not half of the range, but sym is true")
        weight = ScaledWeight(
            values=signed(values, self.bits) if minima is None else values,
            scales=scales,
            minima=minima,
            group=self.group,
            bits=self.bits,
        )
        name = f"{module}.g_idx"
        if name not in files.names:
            return weight
        ordered = by_input(weight, files.get(name, (shape[1],)), name)
        if self.in_order and ordered is not weight:
            raise ModelCorrupt(f"{name}: groups in any order, but desc_act is false")
        return ordered


def read(settings: Mapping[str, Any]) -> Scheme:
    """Out of a ``quantization_config``, or an old folder's ``quantize_config.json``. Raises
    UnsupportedArchitecture."""
    bits = number(settings, "bits")
    if bits not in _BITS:
        raise UnsupportedArchitecture(f"bits = {bits} is not one of: {', '.join(map(str, _BITS))}")
    for name in ("checkpoint_format", "format"):
        one_of(settings, name, "gptq", "gptq", "gptq_v2")
    if settings.get("is_marlin_format"):
        raise UnsupportedArchitecture("is_marlin_format: only files of gptq and gptq_v2 are read")
    group = group_size(settings, "group_size")
    act_order = bool(settings.get("desc_act", False)) and not settings.get("static_groups", False)
    named = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    return Gptq(
        bits=bits,
        group=group,
        symmetric=bool(settings.get("sym", True)),
        in_order=group is None or not act_order,
        zeros_less_one=str(named).lower() != "gptq_v2",
    )
