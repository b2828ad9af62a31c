"""One step of the ranks, as the scheduler makes it."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.ranks.protocol import LAST_DRAWN, StartSampling, Step


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    sequences: tuple[Sequence, ...]
    counts: tuple[int, ...]
    """New tokens of each sequence."""
    draws: tuple[bool, ...]
    """Whether each sequence gets a token."""
    decoding: int
    """Sequences that decode, first among them; the others' tokens are of prompts."""
    message: Step
    sampling: tuple[StartSampling, ...]
    """To be sent before it."""

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.decoding


def make_step(
    step_id: int, chosen: Many[tuple[Sequence, int]], *, decoding: int, block_size: int
) -> ScheduledStep:
    """The next ``count`` tokens of each sequence, which has blocks for them.

    A token that is still being drawn is named by what it will be: the last one of its slot.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    width = max(len(sequence.blocks) for sequence, _ in chosen)
    tables = np.zeros((len(chosen), width), dtype=np.int32)
    for row, (sequence, count) in enumerate(chosen):
        first, last = sequence.computed, sequence.computed + count
        token_ids += sequence.tokens(first, last)
        token_ids += [LAST_DRAWN] * (last - max(first, sequence.known))
        positions += range(first, last)
        slots += [_slot(sequence, at, block_size) for at in range(first, last)]
        starts.append(starts[-1] + count)
        contexts.append(last)
        tables[row, : len(sequence.blocks)] = sequence.blocks
    draws = tuple(_draws(sequence, count) for sequence, count in chosen)
    drawing = [sequence for (sequence, _), one in zip(chosen, draws, strict=True) if one]
    message = Step(
        step_id=step_id,
        token_ids=_ints(token_ids),
        positions=_ints(positions),
        slots=_ints(slots),
        query_starts=_ints(starts),
        context_lens=_ints(contexts),
        block_tables=tables.tobytes(),
        block_table_width=width,
        sampling_slots=_ints(
            [s.slot if one else -1 for (s, _), one in zip(chosen, draws, strict=True)]
        ),
        drawn=_ints([len(s.output) + s.drawing for s, _ in chosen]),
        greedy=all(s.sampling.is_likeliest for s in drawing),
    )
    return ScheduledStep(
        sequences=tuple(sequence for sequence, _ in chosen),
        counts=tuple(count for _, count in chosen),
        draws=draws,
        decoding=decoding,
        message=message,
        sampling=tuple(_start_sampling(s) for s in drawing if not s.sampling_sent),
    )


def _slot(sequence: Sequence, position: int, block_size: int) -> int:
    return sequence.blocks[position // block_size] * block_size + position % block_size


def _ints(values: list[int]) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


def _draws(sequence: Sequence, count: int) -> bool:
    """Whether ``count`` tokens more are all there are."""
    return sequence.computed + count == sequence.length


def _start_sampling(sequence: Sequence) -> StartSampling:
    spec = sequence.sampling
    sequence.sampling_sent = True
    repeats = spec.repetition_penalty != 1
    return StartSampling(
        slot=sequence.slot,
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        min_p=spec.min_p,
        seed=spec.seed,
        logprobs=spec.logprobs,
        repetition_penalty=spec.repetition_penalty,
        presence_penalty=spec.presence_penalty,
        frequency_penalty=spec.frequency_penalty,
        prompt_token_ids=_ints(sequence.prompt) if repeats else b"",
        output_token_ids=_ints(sequence.output) if spec.penalises else b"",
        bias_token_ids=spec.bias_token_ids,
        bias_values=spec.bias_values,
    )
