"""The short way to a step: the same sequences as in the one before, each by a token more.

Nearly every step is one. Nothing of it has to be found out again, and ranks have its arrays: what
is sent is who has got another block.
"""

from collections.abc import Callable

import numpy as np

from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.step import ScheduledStep, StepBatch
from services.decode_worker.ranks.protocol import DecodeOn


def decode_on(
    step_id: int, batch: StepBatch, blocks: BlockPool, left: Callable[[Sequence], int]
) -> ScheduledStep | None:
    """The next step of a batch in which each sequence decodes by one token.

    None, with nothing changed, where something else has to be seen to: a sequence that draws its
    last token or whose draws are all known, or blocks that have run out. ``left``: tokens that a
    sequence may have after those that are being drawn.
    """
    size, short = blocks.block_size, list[int]()
    for place, one in enumerate(batch.chosen):
        sequence = one.sequence
        if not sequence.drawing or left(sequence) <= 0:
            return None
        if sequence.computed >= len(sequence.blocks) * size:
            short.append(place)
    if len(short) > blocks.free_blocks:
        return None
    grown = _grow(batch, short, blocks) if short else b""
    for one in batch.chosen:
        one.sequence.computed += 1
        one.sequence.computing += 1
        one.sequence.drawing += 1
    return ScheduledStep(batch=batch, message=DecodeOn(step_id=step_id, blocks=grown))


def _grow(batch: StepBatch, places: list[int], blocks: BlockPool) -> bytes:
    """A block for each of them; places and blocks, int32 [G, 2]."""
    pairs = list[int]()
    for place, block in zip(places, blocks.allocate(len(places)), strict=True):
        batch.chosen[place].sequence.blocks.append(block)
        pairs += (place, block)
    return np.array(pairs, dtype=np.int32).tobytes()
