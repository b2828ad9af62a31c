"""The short way to a step: the same sequences as in the one before, each by a token more.

Nearly every step is one. Nothing of it has to be found out again, and ranks have its arrays: what
is sent is who has got another block.
"""

from collections.abc import Callable

import numpy as np

from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.kv_room import KvRoom
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.step import ScheduledStep, StepBatch
from services.decode_worker.engine.windows import WindowBlocks
from services.decode_worker.ranks.protocol import DecodeOn


def decode_on(
    batch: StepBatch, room: KvRoom, left: Callable[[Sequence], int]
) -> ScheduledStep | None:
    """The next step of a batch in which each sequence decodes by one token.

    None, with nothing changed, where something else has to be seen to: a sequence that draws its
    last token or whose draws are all known, or blocks that have run out. ``left``: tokens that a
    sequence may have after those that are being drawn.
    """
    blocks, windows = room.blocks, room.windows
    size = blocks.block_size
    short: list[int] = []
    short_windows: list[int] = []
    for place, one in enumerate(batch.chosen):
        sequence = one.sequence
        if not sequence.drawing or left(sequence) <= 0:
            return None
        if sequence.computed >= len(sequence.blocks) * size:
            short.append(place)
        if windows is not None and sequence.computed >= windows.room(sequence):
            short_windows.append(place)
    if len(short) > blocks.free_blocks:
        return None
    if windows is not None and len(short_windows) > windows.free_blocks:
        return None
    grown = _grow(batch, short, blocks) if short else b""
    more = b""
    if windows is not None and short_windows:
        more = _grow_windows(batch, short_windows, windows)
    for one in batch.chosen:
        one.sequence.computed += 1
        one.sequence.computing += 1
        one.sequence.drawing += 1
    return ScheduledStep(batch=batch, message=DecodeOn(blocks=grown, window_blocks=more))


def _grow(batch: StepBatch, places: list[int], blocks: BlockPool) -> bytes:
    """A block for each of them; places and blocks, int32 [G, 2]."""
    new = blocks.allocate(len(places))
    for place, block in zip(places, new, strict=True):
        batch.chosen[place].sequence.blocks.append(block)
    return _pairs(places, new)


def _grow_windows(batch: StepBatch, places: list[int], windows: WindowBlocks) -> bytes:
    """The same of layers with a window."""
    new = windows.allocate(len(places))
    for place, block in zip(places, new, strict=True):
        batch.chosen[place].sequence.window_blocks.append(block)
    return _pairs(places, new)


def _pairs(places: list[int], blocks: list[int]) -> bytes:
    return np.array(list(zip(places, blocks, strict=True)), dtype=np.int32).tobytes()
