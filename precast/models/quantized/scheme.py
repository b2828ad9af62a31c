"""What a scheme of quantised checkpoints tells: needs no torch but to read."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from precast.errors import UnsupportedArchitecture
from precast.models.precision import Quantization
from precast.ops.layout import GROUP

if TYPE_CHECKING:
    from torch import Tensor

    from precast.ops.scaled import ScaledWeight

FLOATS: Final = ("F64", "F32", "F16", "BF16")
"""Types of tensors that are read as numbers, by safetensors' names."""
SCALES: Final = ("F32", "F16", "BF16")


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS
    """Those that it may have."""


class Files(Protocol):
    """A checkpoint's tensors."""

    @property
    def names(self) -> Collection[str]: ...

    def get(self, name: str, shape: tuple[int, ...]) -> "Tensor":
        """Raises ModelCorrupt if it is missing or of another shape."""

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> "Tensor":
        """One of the linears in a tensor [experts, inputs, outputs], as [outputs, inputs]."""


class Scheme(Protocol):
    """How linears of one checkpoint are stored. A linear is called by its module's name; its
    weights are [outputs, inputs]."""

    @property
    def quantization(self) -> Quantization:
        """The format that holds the checkpoint's own values, or else the one that loses least."""

    @property
    def loss(self) -> str:
        """What that format rounds; empty: nothing."""

    def is_stored(self, module: str, names: Collection[str]) -> bool:
        """Whether a linear is quantised and not left as floats. Names: of all tensors."""

    def tensors(
        self, module: str, shape: tuple[int, ...], names: Collection[str]
    ) -> Mapping[str, Stored]:
        """The tensors of a linear, by name."""

    def is_extra(self, name: str) -> bool:
        """Whether a tensor may be there that nothing reads."""

    def read(self, files: Files, module: str, shape: tuple[int, int]) -> "ScaledWeight":
        """A linear's weights. Raises ModelCorrupt."""


def expected_files(
    scheme: Scheme, expected: Mapping[str, tuple[int, ...]], names: Collection[str]
) -> Iterator[tuple[str, Stored]]:
    """The tensors in a model's files, of the shapes that it has as floats."""
    for name, shape in expected.items():
        module = name.removesuffix(".weight")
        if len(shape) > 1 and scheme.is_stored(module, names):
            yield from scheme.tensors(module, shape, names).items()
        else:
            yield name, Stored(shape)


@dataclass(frozen=True, kw_only=True)
class Integers:
    """What schemes of integer weights have in common."""

    bits: int
    group: int | None
    """Inputs that share a scale; None: all of a row."""
    symmetric: bool
    """Whether there are no minima: all zero points are half of the range."""
    in_order: bool = True
    """Whether a group's inputs lie side by side."""

    @property
    def quantization(self) -> Quantization:
        """The kernels' format of such weights."""
        whole = self.in_order and (self.group is None or self.group % GROUP == 0)
        if self.bits == 8 and self.group is None and self.symmetric:
            return "int8"
        if self.bits <= 4 and whole:
            return "q4_0" if self.symmetric else "q4_1"
        return "q8_0"

    @property
    def loss(self) -> str:
        """What that format rounds."""
        if not self.in_order:
            return "act-order: rounded to 8 bits for each 32 inputs"
        if self.group is not None and self.group % GROUP:
            return f"groups of {self.group}: rounded to 8 bits for each 32 inputs"
        if self.symmetric:
            return ""
        return (
            "minima rounded to fp16" if self.bits <= 4 else "zero points: rounded to 8 bits again"
        )


def number(settings: Mapping[str, Any], *names: str) -> int:
    """The first of these entries that is there. Raises UnsupportedArchitecture if it is no whole
    number."""
    value = next((settings[name] for name in names if settings.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnsupportedArchitecture(f"{names[0]} = {ascii(value)[:40]}: expected a whole number")
    return value


def group_size(settings: Mapping[str, Any], *names: str) -> int | None:
    """Inputs that share a scale; None for all of a row, which is written -1."""
    value = number(settings, *names)
    if value == -1:
        return None
    if not 0 < value <= 1 << 20:
        raise UnsupportedArchitecture(f"{names[0]} = {value}: expected -1 or a positive number")
    return value


def one_of(settings: Mapping[str, Any], name: str, default: object, *known: object) -> None:
    """Raises UnsupportedArchitecture for another value of an entry."""
    value = settings.get(name, default)
    value = value.lower() if isinstance(value, str) else value
    if value not in known:
        expected = ", ".join(map(str, known))
        raise UnsupportedArchitecture(f"{name} = {ascii(value)[:40]} is not one of: {expected}")


def block_of(value: object, name: str) -> tuple[int, int]:
    """Rows and inputs that share a scale. Raises UnsupportedArchitecture."""
    if isinstance(value, list) and len(value) == 2 and all(map(_is_side, value)):
        return value[0], value[1]
    raise UnsupportedArchitecture(f"{name}: expected two positive numbers")


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 1 << 20


def groups_of(inputs: int, group: int | None) -> int:
    return 1 if group is None else -(-inputs // group)
