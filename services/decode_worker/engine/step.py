"""One step of the ranks, as the scheduler makes it."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.ranks.protocol import Sampling, Step


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    """New tokens of each sequence."""
    decoding: int
    """Sequences that decode, first among them; the others' tokens are of prompts."""
    message: Step

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.decoding


def make_step(
    step_id: int, chosen: Many[tuple[Sequence, int]], *, decoding: int, block_size: int
) -> ScheduledStep:
    """The next ``count`` tokens of each sequence, which has blocks for them."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    width = max(len(sequence.blocks) for sequence, _ in chosen)
    tables = np.zeros((len(chosen), width), dtype=np.int32)
    for row, (sequence, count) in enumerate(chosen):
        first, last = sequence.computed, sequence.computed + count
        token_ids += sequence.tokens(first, last)
        positions += range(first, last)
        slots += [_slot(sequence, at, block_size) for at in range(first, last)]
        starts.append(starts[-1] + count)
        contexts.append(last)
        tables[row, : len(sequence.blocks)] = sequence.blocks
    message = Step(
        step_id=step_id,
        token_ids=_ints(token_ids),
        positions=_ints(positions),
        slots=_ints(slots),
        query_starts=_ints(starts),
        context_lens=_ints(contexts),
        block_tables=tables.tobytes(),
        block_table_width=width,
        sample=tuple(
            _sampling(s) if s.computed + count == s.length else None for s, count in chosen
        ),
    )
    return ScheduledStep(
        sequences=tuple(sequence for sequence, _ in chosen),
        counts=tuple(count for _, count in chosen),
        decoding=decoding,
        message=message,
    )


def _slot(sequence: Sequence, position: int, block_size: int) -> int:
    return sequence.blocks[position // block_size] * block_size + position % block_size


def _ints(values: list[int]) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


def _sampling(sequence: Sequence) -> Sampling:
    spec = sequence.sampling
    penalised = bool(spec.presence_penalty or spec.frequency_penalty)
    return Sampling(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        seed=spec.seed,
        step=len(sequence.output),
        logprobs=spec.logprobs,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        output_token_ids=_ints(sequence.output) if penalised else b"",
        logit_bias=spec.logit_bias,
    )
