"""One step of the ranks, as the scheduler makes it."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from services.decode_worker.engine.pooled_parts import PooledPart, pooled_parts, pooled_rows
from services.decode_worker.engine.prompt_scores import ScoredPart, scored_parts, scored_rows
from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.ranks.protocol import LAST_DRAWN, DecodeOn, StartSampling, Step


@dataclass(frozen=True)
class Chosen:
    """A sequence's part in a step."""

    sequence: Sequence
    count: int
    """Tokens that it goes on by, in any case."""
    draft: Many[int] = ()
    """Tokens behind them that may turn out to be right."""

    @property
    def tokens(self) -> int:
        return self.count + len(self.draft)

    @property
    def draws(self) -> int:
        """How many of its last tokens give the next one: none while its prompt goes on."""
        ends = self.sequence.computed + self.count == self.sequence.length
        return 1 + len(self.draft) if ends else 0


@dataclass(frozen=True, kw_only=True, eq=False)
class StepBatch:
    """Who is in a step. Steps that only decode on have it in common."""

    chosen: tuple[Chosen, ...]
    draws: tuple[int, ...]
    """Tokens that are drawn for each of them, in their order."""
    decoding: int
    """Sequences that decode, first among them; the others' tokens are of prompts."""

    @cached_property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(one.sequence for one in self.chosen)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        return tuple(one.tokens for one in self.chosen)

    @cached_property
    def tokens(self) -> int:
        return sum(self.counts)

    @cached_property
    def prompt_tokens(self) -> int:
        return sum(self.counts[self.decoding :])

    @cached_property
    def decode_tokens(self) -> int:
        return self.tokens - self.prompt_tokens

    @cached_property
    def all_draws(self) -> int:
        return sum(self.draws)

    @cached_property
    def is_plain(self) -> bool:
        """Whether each sequence decodes, by one token without a draft or a mask."""
        masked = any(one.sequence.matcher is not None for one in self.chosen)
        return self.decoding == len(self.chosen) == self.tokens and not masked


@dataclass(frozen=True, kw_only=True)
class ScheduledStep:
    batch: StepBatch
    message: Step | DecodeOn
    sampling: tuple[StartSampling, ...] = ()
    """To be sent before it."""
    scored: tuple[ScoredPart, ...] = ()
    """Of prompts."""
    pooled: tuple[PooledPart, ...] = ()
    masked: tuple[Sequence, ...] = ()
    """Those whose draws wait for masks."""

    @property
    def chosen(self) -> tuple[Chosen, ...]:
        return self.batch.chosen

    @property
    def draws(self) -> tuple[int, ...]:
        return self.batch.draws

    @property
    def decoding(self) -> int:
        return self.batch.decoding

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        return self.batch.sequences

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each sequence, with those of its draft."""
        return self.batch.counts

    @property
    def tokens(self) -> int:
        return self.batch.tokens

    @property
    def prompt_tokens(self) -> int:
        return self.batch.prompt_tokens

    @property
    def decode_tokens(self) -> int:
        """With those of drafts."""
        return self.batch.decode_tokens


def make_step(
    step_id: int, chosen: Many[Chosen], *, decoding: int, block_size: int
) -> ScheduledStep:
    """The next tokens of each sequence, which has blocks for them.

    A token that is still being drawn is named by what it will be: the last one of its slot.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, contexts = [0], []
    width = max(len(one.sequence.blocks) for one in chosen)
    tables = np.zeros((len(chosen), width), dtype=np.int32)
    for row, one in enumerate(chosen):
        sequence = one.sequence
        first, last = sequence.computed, sequence.computed + one.tokens
        token_ids += sequence.tokens(first, first + one.count)
        token_ids += [LAST_DRAWN] * (first + one.count - max(first, sequence.known))
        token_ids += one.draft
        positions += range(first, last)
        slots += [_slot(sequence.blocks, at, block_size) for at in range(first, last)]
        starts.append(starts[-1] + one.tokens)
        contexts.append(last)
        tables[row, : len(sequence.blocks)] = sequence.blocks
    draws = tuple(one.draws for one in chosen)
    drawing = [one.sequence for one, count in zip(chosen, draws, strict=True) if count]
    drawn = [len(one.sequence.output) + one.sequence.drawing for one in chosen]
    window_slots, window_tables = _window_paging(chosen, width, block_size)
    masked = _masked(chosen, draws)
    batch = StepBatch(chosen=tuple(chosen), draws=draws, decoding=decoding)
    scored = scored_parts(batch.sequences, batch.counts)
    pooled = pooled_parts(batch.sequences, batch.counts)
    message = Step(
        step_id=step_id,
        token_ids=_ints(token_ids),
        positions=_ints(positions),
        slots=_ints(slots),
        query_starts=_ints(starts),
        context_lens=_ints(contexts),
        block_tables=tables.tobytes(),
        block_table_width=width,
        window_slots=window_slots,
        window_tables=window_tables,
        sampling_slots=_ints([one.sequence.slot for one in chosen]),
        draws=_ints(draws),
        drawn=_ints(drawn),
        greedy=all(
            one.sequence.sampling.is_likeliest(before) and one.sequence.matcher is None
            for one, before, count in zip(chosen, drawn, draws, strict=True)
            if count
        ),
        masked=_ints(list(masked)),
        adapters=_adapters(chosen),
        scored=scored_rows(scored),
        pooled=pooled_rows(pooled),
        goes_on=batch.is_plain,
    )
    return ScheduledStep(
        batch=batch,
        message=message,
        sampling=tuple(_start_sampling(s) for s in drawing if not s.sampling_sent),
        scored=scored,
        pooled=pooled,
        masked=tuple(masked.values()),
    )


def _masked(chosen: Many[Chosen], draws: Many[int]) -> dict[int, Sequence]:
    """Sequences with a grammar that draw, by the place of that among the step's draws. They have no
    drafts."""
    places = accumulate(draws, initial=0)
    return {
        place: one.sequence
        for place, one, count in zip(places, chosen, draws, strict=False)
        if count and one.sequence.matcher is not None
    }


def _adapters(chosen: Many[Chosen]) -> bytes:
    """Empty where no sequence has one: that is what most steps are."""
    each = [one.sequence.adapter for one in chosen]
    return _ints(each) if any(each) else b""


def _window_paging(chosen: Many[Chosen], width: int, block_size: int) -> tuple[bytes, bytes]:
    """Slots and block tables of layers with a window; empty where sequences hold no blocks of
    such."""
    if not chosen[0].sequence.window_blocks:
        return b"", b""
    tables = np.zeros((len(chosen), width), dtype=np.int32)
    slots: list[int] = []
    for row, one in enumerate(chosen):
        own, first = one.sequence.window_blocks, one.sequence.window_first
        tables[row, first : first + len(own)] = own
        start, behind = one.sequence.computed, first * block_size
        slots += [_slot(own, at - behind, block_size) for at in range(start, start + one.tokens)]
    return _ints(slots), tables.tobytes()


def _slot(blocks: Many[int], position: int, block_size: int) -> int:
    return blocks[position // block_size] * block_size + position % block_size


def _ints(values: Many[int]) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


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
        output_token_ids=_ints(sequence.output) if spec.looks_back else b"",
        bias_token_ids=spec.bias_token_ids,
        bias_values=spec.bias_values,
        min_tokens=spec.min_tokens,
        ending_token_ids=spec.ending_token_ids,
        banned_sequences=spec.banned_sequences,
    )
