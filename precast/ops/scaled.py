"""Weights that come quantised: small numbers, and what they are multiplied by.

Packing takes them as they are where a kernel's format holds them, so that nothing is rounded a
second time (``packing.py``); for other formats they are floats like any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from precast.ops.gguf_blocks import FileWeight
from precast.ops.layout import GROUP


@dataclass(frozen=True, kw_only=True)
class ScaledWeight:
    """[N, K] weights, each value * scale + minimum of its row's group of inputs."""

    values: Tensor
    """[N, K]: int8, uint8 where there are minima, or an 8-bit float."""
    scales: Tensor
    """float32 [N, groups of a row]"""
    minima: Tensor | None = None
    """Likewise."""
    group: int | None
    """Neighbouring inputs that share a scale; None: all of a row."""
    bits: int
    """Of an integer: -2^(bits - 1) and more without minima, 0 and more with them; 0: floats."""

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.values.shape
        return rows, columns

    def __getitem__(self, part: slice | tuple[slice, slice]) -> "ScaledWeight":
        """Some rows, or some columns of some rows; slices without steps."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        start, stop, _ = columns.indices(self.shape[1])
        return self.rows(rows)._columns(start, stop)

    def rows(self, rows: slice | Tensor) -> "ScaledWeight":
        """Some rows, or these, int64, in their order."""
        minima = None if self.minima is None else self.minima[rows]
        return replace(self, values=self.values[rows], scales=self.scales[rows], minima=minima)

    def _columns(self, start: int, stop: int) -> "ScaledWeight":
        if (start, stop) == (0, self.shape[1]):
            return self
        values = self.values[:, start:stop]
        if self.group is None:
            return replace(self, values=values)
        group = math.gcd(self.group, start) if start % self.group else self.group
        each, groups = self.group // group, slice(start // group, -(-stop // group))

        def some(of: Tensor) -> Tensor:
            return of.repeat_interleave(each, dim=1)[:, groups]

        minima = None if self.minima is None else some(self.minima)
        return replace(self, values=values, scales=some(self.scales), minima=minima, group=group)

    def padded(self, rows: int) -> "ScaledWeight":
        """With this many rows of zeros below."""

        def pad(of: Tensor) -> Tensor:
            return torch.cat((of, of.new_zeros(rows, of.shape[1])))

        minima = None if self.minima is None else pad(self.minima)
        return replace(self, values=pad(self.values), scales=pad(self.scales), minima=minima)

    def floats(self) -> Tensor:
        """float32 [N, K]"""
        if self.group is None:
            result = self.values.float() * self.scales
            return result if self.minima is None else result + self.minima
        columns = self.shape[1]
        result = self.values.float() * self.scales.repeat_interleave(self.group, 1)[:, :columns]
        if self.minima is not None:
            result += self.minima.repeat_interleave(self.group, 1)[:, :columns]
        return result

    def has_groups(self, bits: int) -> bool:
        """Whether 32 neighbouring inputs share a scale, and values are of at most ``bits``."""
        return 0 < self.bits <= bits and (self.group is None or self.group % GROUP == 0)

    def by_group(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [N, G, 32], scales and minima [N, G] of groups of 32, an even number of them;
        values behind the last input repeat it."""
        columns = self.shape[1]
        groups = -(-columns // (2 * GROUP)) * 2

        def stretched(of: Tensor) -> Tensor:
            each = groups if self.group is None else self.group // GROUP
            return _extended(of.repeat_interleave(each, dim=1), groups)

        minima = None if self.minima is None else stretched(self.minima)
        values = _extended(self.values, groups * GROUP)
        return values.unflatten(1, (groups, GROUP)), stretched(self.scales), minima


def _extended(of: Tensor, columns: int) -> Tensor:
    """The first columns, or all and the last one again and again."""
    missing = columns - of.shape[1]
    return of[:, :columns] if missing <= 0 else torch.cat((of, of[:, -1:].expand(-1, missing)), 1)


Weight = Tensor | ScaledWeight | FileWeight
"""[N, K]"""


def floats(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.floats()


def in_order(weight: Weight, rows: Tensor) -> Weight:
    """A weight's rows in another order, int64."""
    if isinstance(weight, FileWeight):
        return weight.in_order(rows)
    return weight.rows(rows) if isinstance(weight, ScaledWeight) else weight[rows]


def below(parts: Sequence[Weight]) -> Weight:
    """The rows of several weights one below the other."""
    if len(parts) == 1:
        return parts[0]
    own = [part for part in parts if isinstance(part, FileWeight)]
    if len(own) == len(parts):
        return FileWeight([raw for part in own for raw in part.raws])
    scaled = [part for part in parts if isinstance(part, ScaledWeight)]
    if len(scaled) < len(parts) or len({_kind(part) for part in scaled}) > 1:
        return torch.cat([floats(part) for part in parts])
    minima = [part.minima for part in scaled if part.minima is not None]
    return replace(
        scaled[0],
        values=torch.cat([part.values for part in scaled]),
        scales=torch.cat([part.scales for part in scaled]),
        minima=torch.cat(minima) if minima else None,
    )


def _kind(weight: ScaledWeight) -> tuple[Any, ...]:
    """What weights have in common that can lie below each other."""
    return (weight.values.dtype, weight.group, weight.bits, weight.minima is None)
