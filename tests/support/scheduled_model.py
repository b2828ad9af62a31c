"""A scheduler and one rank's model in this process: steps are made and computed as they are served,
and the logits of each draw are kept."""

from collections import deque
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from precast.models.config import load_config
from precast.models.precision import KvDtype, Precision
from precast.models.windows import model_window
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.windows import WindowBlocks
from services.decode_worker.ranks import model as rank_model
from services.decode_worker.ranks.prepared import Prepared, RunningBatch, prepare
from services.decode_worker.ranks.protocol import Init, Step

BLOCK_SIZE = 16
CONTEXT = 512
SLOTS = 4


class ScheduledModel:
    """``window_blocks``: of layers that attend to a window; 0: they have as many as the others."""

    def __init__(
        self, folder: Path, *, blocks: int, window_blocks: int, chunk: int, kv_dtype: KvDtype
    ) -> None:
        init = Init(
            model_dir=str(folder),
            packed_dir=str(folder / "packed"),
            precision=Precision(kv_dtype=kv_dtype),
            tp_rank=0,
            tp_size=1,
            cores=(-1,),
            kv_blocks=blocks,
            window_blocks=window_blocks,
            block_size=BLOCK_SIZE,
            max_batch_size=SLOTS,
            max_context_length=CONTEXT,
            group_id="none",
            kernel_provider="native",
        )
        self.model = rank_model.load(init, lambda _done, _total: None)
        window = model_window(load_config(folder))
        self.windows = WindowBlocks(window_blocks, BLOCK_SIZE, window) if window_blocks else None
        self._scheduler = Scheduler(
            blocks=blocks,
            block_size=BLOCK_SIZE,
            max_batch_size=SLOTS,
            max_context_length=CONTEXT,
            max_waiting=64,
            prefill_chunk=chunk,
            pace=Pace(1e3),
            windows=self.windows,
        )
        self._last = np.zeros(SLOTS, dtype=np.int32)
        self._running: RunningBatch | None = None
        self._logits: dict[str, list[Tensor]] = {}
        self.repeats = 0
        """Steps of which the rank was told only that they go on."""

    def run(self, prompts: dict[str, list[int]], tokens: int) -> list[tuple[Sequence, Tensor]]:
        """Greedy answers to prompts that come at once, and the logits [tokens, V] of each."""
        sequences = [_sequence(name, prompt, tokens) for name, prompt in prompts.items()]
        for sequence in sequences:
            self._logits[sequence.request_id] = []
            self._scheduler.add(sequence)
        under_way = deque[tuple[ScheduledStep, list[int]]]()
        while True:
            step = self._scheduler.schedule(0)
            if step is not None:
                under_way.append((step, self._compute(step)))
            if not under_way:
                break
            if step is None or len(under_way) == 2:
                self._scheduler.apply(*under_way.popleft())
        assert self._scheduler.blocks.free_blocks == self._scheduler.blocks.total
        assert self.windows is None or self.windows.free_blocks == self.windows.total
        return [(one, torch.stack(self._logits[one.request_id][:tokens])) for one in sequences]

    def _compute(self, step: ScheduledStep) -> list[int]:
        batch, draws, _ = self._prepared(step)
        with torch.inference_mode():
            logits = self.model.step(batch, draws.rows, 0)
        drawn: list[int] = logits.argmax(-1).tolist() if len(draws.rows) else []
        self._last[draws.slots] = drawn
        owners = [one for one, draws in zip(step.sequences, step.draws, strict=True) if draws]
        for owner, row in zip(owners, logits, strict=False):
            self._logits[owner.request_id].append(row.clone())
        return drawn

    def _prepared(self, step: ScheduledStep) -> Prepared:
        if isinstance(step.message, Step):
            prepared = prepare(step.message, self._last)
            if step.message.goes_on:
                self._running = RunningBatch(prepared, BLOCK_SIZE)
            return prepared
        assert self._running is not None
        self.repeats += 1
        return self._running.next(step.message, self._last)


def _sequence(name: str, prompt: list[int], tokens: int) -> Sequence:
    return Sequence(
        request_id=name,
        prompt=prompt,
        sampling=SamplingSpec(),
        max_tokens=tokens,
        stop_token_ids=frozenset(),
    )
