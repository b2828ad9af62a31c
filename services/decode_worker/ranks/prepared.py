"""A step's arrays as a rank computes with them: out of its message, or out of the step before."""

from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precast.models.layers import Paging
from services.decode_worker.ranks.model import Batch
from services.decode_worker.ranks.protocol import LAST_DRAWN, DecodeOn, Step

Ints = NDArray[np.int32]
_MORE_BLOCKS: Final = 8
"""By so many a block table gets wider: not for each block of the longest sequence."""


class Draws(NamedTuple):
    """What a step draws: [D] each."""

    rows: Ints
    """Of the step's tokens, that which the draw follows."""
    slots: Ints
    drawn: Ints
    """Tokens that the sequence has drawn before."""


class Prepared(NamedTuple):
    batch: Batch
    draws: Draws
    greedy: bool


def prepare(step: Step, last: Ints) -> Prepared:
    """``last``: [slots] the token that was drawn last for each."""
    slots = np.frombuffer(step.sampling_slots, dtype=np.int32)
    batch = Batch(
        token_ids=_token_ids(step, slots, last),
        positions=_ints(step.positions).long(),
        paging=Paging(
            slots=_ints(step.slots),
            query_starts=_ints(step.query_starts),
            context_lens=_ints(step.context_lens),
            block_tables=_ints(step.block_tables).view(-1, step.block_table_width),
        ),
    )
    return Prepared(batch=batch, draws=_draws(step, slots), greedy=step.greedy)


class RunningBatch:
    """Sequences that decode on, one token a step: their arrays go from each step to the next."""

    def __init__(self, prepared: Prepared, block_size: int) -> None:
        batch = prepared.batch
        self._block_size = block_size
        self._slots = prepared.draws.slots
        self._drawn = prepared.draws.drawn
        self._rows = np.arange(len(self._slots), dtype=np.int32)
        self._ids = batch.token_ids.numpy()
        self._positions = batch.positions.numpy()
        self._cache_slots = batch.paging.slots.numpy()
        self._contexts = batch.paging.context_lens.numpy()
        self._tables = batch.paging.block_tables.numpy()
        self._prepared = prepared

    def next(self, command: DecodeOn, last: Ints) -> Prepared:
        """The next step's; they are good until the one after it."""
        self._positions += 1
        self._contexts += 1
        self._drawn += 1
        self._ids[:] = last[self._slots]
        columns, offsets = np.divmod(self._positions, self._block_size)
        if command.blocks:
            self._add_blocks(np.frombuffer(command.blocks, dtype=np.int32), columns)
        self._cache_slots[:] = self._tables[self._rows, columns] * self._block_size + offsets
        return self._prepared

    def _add_blocks(self, pairs: Ints, columns: NDArray[np.int64]) -> None:
        rows, blocks = pairs[::2], pairs[1::2]
        if columns[rows].max() >= self._tables.shape[1]:
            self._tables = np.pad(self._tables, ((0, 0), (0, _MORE_BLOCKS)))
            self._prepared = _with_tables(self._prepared, torch.from_numpy(self._tables))
        self._tables[rows, columns[rows]] = blocks


def _with_tables(prepared: Prepared, block_tables: Tensor) -> Prepared:
    batch = prepared.batch
    paging = batch.paging._replace(block_tables=block_tables)
    return prepared._replace(batch=replace(batch, paging=paging))


def _draws(step: Step, slots: Ints) -> Draws:
    counts = np.frombuffer(step.draws, dtype=np.int32)
    before = np.frombuffer(step.drawn, dtype=np.int32)
    ends = np.frombuffer(step.query_starts, dtype=np.int32)[1:]
    # the place of each draw among its sequence's
    starts = np.cumsum(counts) - counts
    places = np.arange(counts.sum(), dtype=np.int32) - np.repeat(starts, counts)
    return Draws(
        rows=np.repeat(ends - counts, counts) + places,
        slots=np.repeat(slots, counts),
        drawn=np.repeat(before, counts) + places,
    )


def _token_ids(step: Step, slots: Ints, last: Ints) -> Tensor:
    """int64 [T]: those that the leader does not know yet are their slots' last ones."""
    ids = np.frombuffer(step.token_ids, dtype=np.int32).astype(np.int64)
    drawn = np.flatnonzero(ids == LAST_DRAWN)
    ids[drawn] = last[slots[drawn]]
    return torch.from_numpy(ids)


def _ints(data: bytes) -> Tensor:
    # A copy, because the message's bytes are read-only and torch tensors are not.
    return torch.from_numpy(np.frombuffer(data, dtype=np.int32).copy())
