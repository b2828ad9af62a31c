"""Rows of a GGUF file as the kernels take them, without a float in between."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from precast.errors import ModelCorrupt
from precast.ops import native as native  # registers the operators
from precast.ops.gguf_types import BLOCKS, GgufType
from precast.ops.layout import PANEL
from precast.ops.mixed import MixedPart


class RawRows(NamedTuple):
    """Some rows of a tensor, or of some of its columns, as they are in a file."""

    type: GgufType
    columns: int
    rows: Tensor
    """uint8 [N, bytes of a row]; rows may lie apart."""

    @property
    def format(self) -> int:
        """Of the kernel that runs them."""
        return int(torch.ops.precast.gguf_format(int(self.type)))

    def cut(self, start: int, stop: int) -> "RawRows | None":
        """Only these columns; None where they begin or end within a block."""
        inputs, nbytes = BLOCKS[self.type][:2]
        if start % inputs or stop % inputs:
            return None
        part = self.rows[:, start // inputs * nbytes : stop // inputs * nbytes]
        return RawRows(self.type, stop - start, part)


def pack_raw(raw: RawRows, out: Tensor) -> bool:
    """Packs rows into ``out``, uint8 of ``raw.format``'s panels. Whether all of its scales and
    numbers are finite."""
    sound: bool = torch.ops.precast.pack_gguf(raw.rows, int(raw.type), raw.columns, out)
    return sound


def values_of(raw: RawRows) -> Tensor:
    """The float32 [N, columns] weights that the rows stand for."""
    count = raw.rows.shape[0]
    panels = -(-count // PANEL)
    size = int(torch.ops.precast.panel_bytes(raw.format, raw.columns))
    packed = torch.empty((panels, size), dtype=torch.uint8)
    pack_raw(raw, packed)
    found: Tensor = torch.ops.precast.unpack(torch.arange(count), packed, raw.columns, raw.format)
    return found


class FileWeight:
    """[N, K] weights as a GGUF file has them: tensors, or rows of some, one below the other."""

    def __init__(self, raws: Sequence[RawRows]) -> None:
        self.raws = tuple(raws)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(raw.rows.shape[0] for raw in self.raws), self.raws[0].columns

    def __getitem__(self, part: slice | tuple[slice, slice]) -> "FileWeight | Tensor":
        """Some rows, or some columns of some rows; slices without steps for columns. Floats where
        columns are cut within a block."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        chosen = self._rows(torch.arange(self.shape[0])[rows])
        start, stop, _ = columns.indices(self.shape[1])
        if (start, stop) == (0, self.shape[1]):
            return chosen
        cuts = [raw.cut(start, stop) for raw in chosen.raws if start < stop]
        found = [cut for cut in cuts if cut is not None]
        return FileWeight(found) if len(found) == len(chosen.raws) else chosen.floats()[:, columns]

    def in_order(self, rows: Tensor) -> "FileWeight | Tensor":
        """These rows, int64; floats where those of several tensors are mixed."""
        own = self._owner(rows)
        return self._rows(rows) if bool((own.diff() >= 0).all()) else self.floats()[rows]

    def kinds(self) -> list[MixedPart]:
        return [MixedPart(raw.format, raw.rows.shape[0]) for raw in self.raws]

    def pack_into(self, panels: Sequence[Tensor]) -> None:
        """Raises ModelCorrupt."""
        for raw, out in zip(self.raws, panels, strict=True):
            if not pack_raw(raw, out):
                raise ModelCorrupt(
                    f"weights of type {raw.type.name} have scales that are no numbers"
                )

    def floats(self) -> Tensor:
        """float32 [N, K]"""
        found = [values_of(raw) for raw in self.raws]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _starts(self) -> Tensor:
        return torch.tensor([0, *(raw.rows.shape[0] for raw in self.raws)]).cumsum(0)

    def _owner(self, rows: Tensor) -> Tensor:
        """Which of the tensors each row is of."""
        return torch.bucketize(rows.contiguous(), self._starts()[1:], right=True)

    def _rows(self, rows: Tensor) -> "FileWeight":
        """Rows that ascend from tensor to tensor; views where they are neighbours."""
        starts, own = self._starts().tolist(), self._owner(rows)
        found = []
        for index, (raw, start) in enumerate(zip(self.raws, starts, strict=False)):
            mine = rows[own == index] - start
            if len(mine):
                first, last = int(mine[0]), int(mine[-1]) + 1
                near = len(mine) == last - first and bool((mine.diff() == 1).all())
                found.append(raw._replace(rows=raw.rows[first:last] if near else raw.rows[mine]))
        return FileWeight(found or [self.raws[0]._replace(rows=self.raws[0].rows[:0])])
