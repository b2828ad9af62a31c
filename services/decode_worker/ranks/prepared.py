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
    paging = Paging(
        slots=_ints(step.slots),
        query_starts=_ints(step.query_starts),
        context_lens=_ints(step.context_lens),
        block_tables=_ints(step.block_tables).view(-1, step.block_table_width),
    )
    batch = Batch(
        token_ids=_token_ids(step, slots, last),
        positions=_ints(step.positions).long(),
        paging=paging,
        window_paging=_window_paging(step, paging) if step.window_tables else None,
        adapters=_adapters(step),
    )
    return Prepared(batch=batch, draws=_draws(step, slots), greedy=step.greedy)


def _window_paging(step: Step, paging: Paging) -> Paging:
    return paging._replace(
        slots=_ints(step.window_slots),
        block_tables=_ints(step.window_tables).view(-1, step.block_table_width),
    )


class _Table:
    """Where the tokens of a batch that decodes on live, in the cache of some of the layers."""

    def __init__(self, paging: Paging, block_size: int) -> None:
        self._block_size = block_size
        self._rows = np.arange(len(paging.slots), dtype=np.int32)
        self._slots = paging.slots.numpy()
        self._table = paging.block_tables.numpy()
        self.paging = paging

    def next(self, columns: NDArray[np.int64], offsets: NDArray[np.int64], blocks: bytes) -> bool:
        """Goes on to tokens in these columns of the table; ``blocks``: those that are new. Returns
        whether the paging is another one."""
        widens = bool(blocks) and self._add(np.frombuffer(blocks, dtype=np.int32), columns)
        self._slots[:] = self._table[self._rows, columns] * self._block_size + offsets
        return widens

    def _add(self, pairs: Ints, columns: NDArray[np.int64]) -> bool:
        rows, blocks = pairs[::2], pairs[1::2]
        widens = bool(columns[rows].max() >= self._table.shape[1])
        if widens:
            self._table = np.pad(self._table, ((0, 0), (0, _MORE_BLOCKS)))
            self.paging = self.paging._replace(block_tables=torch.from_numpy(self._table))
        self._table[rows, columns[rows]] = blocks
        return widens


class RunningBatch:
    """Sequences that decode on, one token a step: their arrays go from each step to the next."""

    def __init__(self, prepared: Prepared, block_size: int) -> None:
        batch = prepared.batch
        self._block_size = block_size
        self._slots = prepared.draws.slots
        self._drawn = prepared.draws.drawn
        self._ids = batch.token_ids.numpy()
        self._positions = batch.positions.numpy()
        self._contexts = batch.paging.context_lens.numpy()
        self._table = _Table(batch.paging, block_size)
        window = batch.window_paging
        self._window = _Table(window, block_size) if window is not None else None
        self._prepared = prepared

    def next(self, command: DecodeOn, last: Ints) -> Prepared:
        """The next step's; they are good until the one after it."""
        self._positions += 1
        self._contexts += 1
        self._drawn += 1
        self._ids[:] = last[self._slots]
        columns, offsets = np.divmod(self._positions, self._block_size)
        widens = self._table.next(columns, offsets, command.blocks)
        if self._window is not None:
            widens |= self._window.next(columns, offsets, command.window_blocks)
        if widens:
            self._take_tables()
        return self._prepared

    def _take_tables(self) -> None:
        window = self._window.paging if self._window is not None else None
        batch = replace(self._prepared.batch, paging=self._table.paging, window_paging=window)
        self._prepared = self._prepared._replace(batch=batch)


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


def _adapters(step: Step) -> Tensor | None:
    """int32 [T]"""
    if not step.adapters:
        return None
    starts = np.frombuffer(step.query_starts, dtype=np.int32)
    each = np.frombuffer(step.adapters, dtype=np.int32)
    return torch.from_numpy(np.repeat(each, starts[1:] - starts[:-1]))


def _ints(data: bytes) -> Tensor:
    # A copy, because the message's bytes are read-only and torch tensors are not.
    return torch.from_numpy(np.frombuffer(data, dtype=np.int32).copy())
