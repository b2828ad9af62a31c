"""compressed-tensors, as llm-compressor writes it: 8-bit integers or floats (``weight`` and
``weight_scale``), or 4 and 8 bits packed into words (``weight_packed``).

Scales of activations, where a checkpoint has fixed ones, are not used: our kernels take scales of
the activations that come, 32 at a time, which loses less.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from precast.errors import UnsupportedArchitecture
from precast.models.quantized.fp8 import Fp8
from precast.models.quantized.scheme import (
    SCALES,
    Files,
    Integers,
    Scheme,
    Stored,
    block_of,
    group_size,
    groups_of,
    number,
    one_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from precast.ops.scaled import ScaledWeight

_EXTRAS: Final = tuple(
    f"{of}_{kind}" for of in ("input", "output", "q", "k", "v") for kind in ("scale", "zero_point")
)
"""Of activations, and of caches as ``kv_cache_scheme`` has them."""
_FORMATS: Final = ("int-quantized", "naive-quantized", "float-quantized", "pack-quantized")


@dataclass(frozen=True, kw_only=True)
class CompressedIntegers(Integers):
    """``int-quantized``, and ``pack-quantized`` with ``packed``."""

    per_tensor: bool
    """One scale for all rows."""
    packed: bool

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        return f"{module}.{'weight_packed' if self.packed else 'weight_scale'}" in names

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        del names
        rows, inputs = shape
        each = 32 // self.bits
        found = {f"{module}.weight_scale": Stored(self._scales(shape), SCALES)}
        if self.packed:
            found[f"{module}.weight_packed"] = Stored((rows, -(-inputs // each)), ("I32",))
        else:
            found[f"{module}.weight"] = Stored(shape, ("I8",))
        if not self.symmetric:
            found[f"{module}.weight_zero_point"] = self._zero_points(shape)
        if not self.in_order:
            found[f"{module}.weight_g_idx"] = Stored((inputs,), ("I32",))
        return found

    def is_extra(self, name: str) -> bool:
        extras = (*_EXTRAS, "weight_shape", "weight_zero_point", "weight_g_idx")
        return name.rpartition(".")[2] in extras

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        from precast.models.quantized.words import finite
        from precast.ops.scaled import ScaledWeight

        scales = finite(
            files.get(f"{module}.weight_scale", self._scales(shape)), f"{module}.weight_scale"
        )
        scales = scales.reshape(-1, scales.shape[-1]).expand(shape[0], -1)
        values, minima = self._values(files, module, shape), None
        if not self.symmetric:
            # Signed values and zero points; a minimum belongs to the value 0 of unsigned ones.
            half = 1 << (self.bits - 1)
            zeros = self._signed_zeros(files, module, shape).float()
            values, minima = (values + half).byte(), -scales * (zeros + half)
        weight = ScaledWeight(
            values=values, scales=scales, minima=minima, group=self.group, bits=self.bits
        )
        return weight if self.in_order else _reordered(files, module, weight)

    def _scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) if self.per_tensor else (shape[0], groups_of(shape[1], self.group))

    def _zero_points(self, shape: tuple[int, ...]) -> Stored:
        scales = self._scales(shape)
        if not self.packed:
            return Stored(scales, ("I8",))
        return Stored((-(-scales[0] // (32 // self.bits)), *scales[1:]), ("I32",))

    def _values(self, files: Files, module: str, shape: tuple[int, int]) -> "Tensor":
        """int8"""
        from precast.models.quantized.words import signed, unpacked

        if not self.packed:
            return files.get(f"{module}.weight", shape)
        stored = self.tensors(module, shape, ())[f"{module}.weight_packed"]
        words = files.get(f"{module}.weight_packed", stored.shape)
        return signed(unpacked(words, self.bits, by_rows=False)[:, : shape[1]], self.bits)

    def _signed_zeros(self, files: Files, module: str, shape: tuple[int, int]) -> "Tensor":
        from precast.models.quantized.words import signed, unpacked

        zeros = files.get(f"{module}.weight_zero_point", self._zero_points(shape).shape)
        if not self.packed:
            return zeros.reshape(-1, zeros.shape[-1])
        zeros = zeros.reshape(zeros.shape[0], -1)
        return signed(unpacked(zeros, self.bits, by_rows=True)[: shape[0]], self.bits)


def _reordered(files: Files, module: str, weight: "ScaledWeight") -> "ScaledWeight":
    """A weight whose inputs' groups are named one by one."""
    from precast.models.quantized.words import by_input

    groups = files.get(f"{module}.weight_g_idx", (weight.shape[1],))
    return by_input(weight, groups, f"{module}.weight_g_idx")


def read(settings: Mapping[str, Any]) -> Scheme:
    """Out of a ``quantization_config``. Raises UnsupportedArchitecture."""
    one_of(settings, "format", "", *_FORMATS)
    _refuse_more(settings)
    group = _only_group(settings)
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or group.get("output_activations"):
        raise UnsupportedArchitecture("config_groups: only quantised weights are supported")
    one_of(weights, "dynamic", False, False)
    if weights.get("type", "int") == "float":
        return _floats(weights)
    return _integers(weights, packed=settings.get("format") == "pack-quantized")


def _refuse_more(settings: Mapping[str, Any]) -> None:
    sparsity = settings.get("sparsity_config") or {}
    one_of(sparsity, "format", "dense", "dense", None)
    if settings.get("transform_config"):
        raise UnsupportedArchitecture("transform_config (rotated weights) is not supported")


def _only_group(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise UnsupportedArchitecture("config_groups is missing")
    values = list(groups.values())
    same = all(
        isinstance(value, Mapping) and value.get("weights") == values[0].get("weights")
        for value in values
    )
    if not same:
        raise UnsupportedArchitecture("config_groups of several kinds of weights: only one can be")
    first: Mapping[str, Any] = values[0]
    return first


def _integers(weights: Mapping[str, Any], *, packed: bool) -> Scheme:
    bits = number(weights, "num_bits")
    if bits not in ((4, 8) if packed else (8,)):
        raise UnsupportedArchitecture(f"num_bits = {bits} is not supported")
    one_of(weights, "strategy", "tensor", "tensor", "channel", "group")
    one_of(weights, "actorder", None, None, False, True, "group", "weight", "static", "dynamic")
    strategy = str(weights.get("strategy", "tensor")).lower()
    return CompressedIntegers(
        bits=bits,
        group=group_size(weights, "group_size") if strategy == "group" else None,
        per_tensor=strategy == "tensor",
        symmetric=bool(weights.get("symmetric", True)),
        packed=packed,
        in_order=weights.get("actorder") not in ("group", "dynamic", True),
    )


def _floats(weights: Mapping[str, Any]) -> Scheme:
    one_of(weights, "num_bits", 8, 8)
    one_of(weights, "symmetric", True, True)
    one_of(weights, "strategy", "tensor", "tensor", "channel", "block")
    strategy = str(weights.get("strategy", "tensor")).lower()
    if strategy != "block":
        return Fp8(block=None, per_row=strategy == "channel", extras=_EXTRAS)
    block = block_of(weights.get("block_structure"), "block_structure")
    return Fp8(block=block, per_row=False, extras=_EXTRAS)
