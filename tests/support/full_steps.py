"""Steps in full: what a rank's arrays are when it is told to decode on."""

import msgspec
import numpy as np
from torch import Tensor

from services.decode_worker.ranks.prepared import RunningBatch, prepare
from services.decode_worker.ranks.protocol import LAST_DRAWN, DecodeOn, Step

_NOTHING_DRAWN = np.zeros(64, dtype=np.int32)


class FullSteps:
    """Follows one scheduler's steps as its ranks do."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._last: Step | None = None
        self._running: RunningBatch | None = None

    def full(self, message: Step | DecodeOn) -> Step:
        if isinstance(message, DecodeOn):
            return self._next(message)
        if message.goes_on:
            self._last = message
            self._running = RunningBatch(prepare(message, _NOTHING_DRAWN), self._block_size)
        return message

    def _next(self, message: DecodeOn) -> Step:
        assert self._last is not None and self._running is not None
        batch, draws, _ = self._running.next(message, _NOTHING_DRAWN)
        window = batch.window_paging
        return msgspec.structs.replace(
            self._last,
            token_ids=np.full(len(batch.token_ids), LAST_DRAWN, dtype=np.int32).tobytes(),
            positions=_bytes(batch.positions),
            slots=_bytes(batch.paging.slots),
            context_lens=_bytes(batch.paging.context_lens),
            block_tables=_bytes(batch.paging.block_tables),
            block_table_width=batch.paging.block_tables.shape[1],
            window_slots=_bytes(window.slots) if window is not None else b"",
            window_tables=_bytes(window.block_tables) if window is not None else b"",
            drawn=draws.drawn.astype(np.int32).tobytes(),
        )


def _bytes(values: Tensor) -> bytes:
    return values.numpy().astype(np.int32).tobytes()
