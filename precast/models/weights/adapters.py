"""Adapters' weights as graphs take them: those of all adapters side by side.

A rank writes each row's adapter of a step, counted from 1 on, or 0 for none, into one tensor that
all layers have, so that no graph has to be told of it.
"""

import math
from collections.abc import Sequence
from typing import Final, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from precast.errors import ConfigError
from precast.models.adapter_limits import MAX_ADAPTED_TOKENS
from precast.models.shape import AdapterShape
from precast.models.weights.adapter_folder import Adapter
from precast.ops.native import has_adapters

MAX_ROWS: Final = MAX_ADAPTED_TOKENS
"""Tokens of a step, at the most."""
RANDOM_ADAPTERS: Final = 2
ADAPTER_DTYPE: Final = torch.float16
"""Half of float32's memory to read; eight times as exact as bfloat16, for which ``balanced`` keeps
values within its range."""
Pair = tuple[Tensor, Tensor]


class AdapterSource(Protocol):
    """Where adapters' weights come from."""

    slots: Tensor
    """int32 [MAX_ROWS]"""
    count: int

    def get(self, number: int, module: str, rows: int, columns: int) -> Pair | None:
        """A [rank, columns] and B [rows, rank], scaled, of an adapter, in ``ADAPTER_DTYPE``'s
        range; None: it leaves the linear as it is."""


class AdapterFolders:
    """What PEFT has written."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Raises ConfigError if the native library is too old for them."""
        if not has_adapters():
            raise ConfigError("native kernels are older than adapters: run `make native`")
        self._adapters = adapters
        self.count = len(adapters)
        self.slots = torch.zeros(MAX_ROWS, dtype=torch.int32)

    def get(self, number: int, module: str, rows: int, columns: int) -> Pair | None:
        del rows, columns  # they were compared with the model's as the header was read
        adapter = self._adapters[number]
        if module not in adapter.ranks:
            return None
        name = f"base_model.model.{module}"
        with safe_open(adapter.weights, framework="pt") as file:
            a, b = (file.get_tensor(f"{name}.lora_{side}.weight").float() for side in "AB")
        pair = balanced(a, b * adapter.scale(module))
        if max(map(_largest, pair)) > torch.finfo(ADAPTER_DTYPE).max:
            raise ConfigError(f"adapter {adapter.name}: values of {module} are beyond 16 bits")
        return pair


def balanced(a: Tensor, b: Tensor) -> Pair:
    """A and B with largest values of about one size, by a power of two: their product stays."""
    first, second = _largest(a), _largest(b)
    if not (0 < first < math.inf and 0 < second < math.inf):
        return a, b
    power = 2.0 ** round((math.log2(second) - math.log2(first)) / 2)
    return a * power, b / power


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


class RandomAdapters:
    """For graphs to be tried with: rows by turns with one, with another, and with none."""

    def __init__(
        self, shape: AdapterShape, generator: torch.Generator, count: int = RANDOM_ADAPTERS
    ) -> None:
        self._shape = shape
        self._generator = generator
        self.count = count
        self.slots = (torch.arange(MAX_ROWS) % (count + 1)).int()

    def get(self, number: int, module: str, rows: int, columns: int) -> Pair | None:
        del number, module
        rank = self._shape.rank
        a = torch.randn(rank, columns, generator=self._generator) * columns**-0.5
        b = torch.randn(rows, rank, generator=self._generator) * rank**-0.5
        return a, b * 0.3


def fill(
    a: Tensor, b: Tensor, at: int, column: int, rows: Tensor, inputs: Tensor, rank: int
) -> None:
    """Puts B's rows and A's columns of one part of a linear into an adapter's ``a``
    [K, parts * rank] and ``b`` [rank, N]; ``at``: the part's number; ``column``: its first of N."""
    own = len(inputs)
    a[:, at * rank : at * rank + own] = inputs.T
    b[:own, column : column + len(rows)] = rows.T
