"""Continuous batching: which sequences run in the next step, and where their tokens live.

Pure bookkeeping, without IO or clock. A sequence waits until it has blocks for its prompt, is
prefilled in chunks, then decodes one token a step together with all the others. A step has a token
of every decoding sequence, and chunks of prompts in what is left of its budget. When blocks run
out, the youngest running sequence gives up its own and waits again; it is prefilled anew with what
it had generated, so nothing is lost but time.
"""

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from precast.errors import ContextLengthExceeded, Overloaded
from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.ranks.protocol import Sampling, Step

MAX_LOSSES: Final = 3


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, kw_only=True)
class SamplingSpec:
    """How a request's tokens are drawn, for its whole life (``rank_protocol.Sampling``)."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    logprobs: int = -1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)


@dataclass(kw_only=True, eq=False)
class Sequence:
    request_id: str
    prompt: list[int]
    sampling: SamplingSpec
    max_tokens: int
    stop_token_ids: frozenset[int]
    output: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose keys and values are in the cache."""
    blocks: list[int] = field(default_factory=list)
    losses: int = 0
    """Times that the cache was lost in a step with this sequence in it."""
    alive: bool = True
    """False once finished or aborted."""

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens of prompt and output at positions [start, stop)."""
        split = len(self.prompt)
        if start >= split:
            return self.output[start - split : stop - split]
        return self.prompt[start:stop] + self.output[: max(0, stop - split)]


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


class Scheduler:
    def __init__(
        self,
        *,
        blocks: int,
        block_size: int,
        max_batch_size: int,
        max_context_length: int,
        max_waiting: int,
        prefill_chunk: int,
    ) -> None:
        self.blocks = BlockPool(blocks, block_size)
        self._max_batch_size = max_batch_size
        self._max_context_length = max_context_length
        self._max_waiting = max_waiting
        self._prefill_chunk = prefill_chunk
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        """Sequences with a slot, oldest first."""

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises Overloaded or ContextLengthExceeded."""
        capacity = min(self._max_context_length, self.blocks.total * self.blocks.block_size)
        if len(sequence.prompt) >= capacity:
            raise ContextLengthExceeded(
                f"the prompt has {len(sequence.prompt)} tokens; prompt and completion together may "
                f"have {capacity}"
            )
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests are waiting already")
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """Drops a sequence and frees its blocks; safe while a step with it is running."""
        for queue in (self._running, self._waiting):
            for sequence in queue:
                if sequence.request_id == request_id:
                    queue.remove(sequence)
                    self._retire(sequence)
                    return sequence
        return None

    finish = abort

    def lose_cache(self, step: ScheduledStep | None) -> list[Sequence]:
        """Puts everything that had a slot back in front of the queue, oldest first.

        It is prefilled again with what it had generated. A sequence may be what ended the ranks, so
        it is dropped, and returned, once ``MAX_LOSSES`` steps with it were lost; ``step`` is the
        one that was lost now.
        """
        for sequence in step.sequences if step is not None else ():
            sequence.losses += sequence.alive
        for sequence in self._running[::-1]:
            self._preempt(sequence)
        lost = [s for s in self._waiting if s.losses >= MAX_LOSSES]
        for sequence in lost:
            self._waiting.remove(sequence)
            self._retire(sequence)
        return lost

    def schedule(self, step_id: int) -> ScheduledStep | None:
        """The next step, or None if there is nothing to do.

        A step has up to ``prefill_chunk`` tokens: a long prompt holds up the sequences that decode
        beside it by a chunk at a time. However many decode, half of it is left to prompts.
        """
        decoding = self._decoding()
        budget = max(self._prefill_chunk - len(decoding), self._prefill_chunk // 2, 1)
        chosen = [(sequence, 1) for sequence in decoding] + self._prompt_chunks(budget)
        return self._step(step_id, chosen, len(decoding)) if chosen else None

    def apply(
        self, step: ScheduledStep, token_ids: list[int]
    ) -> list[tuple[Sequence, int, FinishReason | None]]:
        """Takes in a step's draws; -1 where nothing was drawn. Finished sequences free their
        blocks."""
        if len(token_ids) != len(step.sequences):
            raise ValueError(f"{len(token_ids)} tokens for {len(step.sequences)} sequences")
        outcomes = []
        for sequence, count, token in zip(step.sequences, step.counts, token_ids, strict=True):
            if not sequence.alive:
                continue
            sequence.computed += count
            if token < 0:
                continue
            sequence.output.append(token)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self._running.remove(sequence)
                self._retire(sequence)
            outcomes.append((sequence, token, reason))
        return outcomes

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token in sequence.stop_token_ids:
            return FinishReason.STOP
        full = sequence.length >= min(
            self._max_context_length, self.blocks.total * self.blocks.block_size
        )
        if full or len(sequence.output) >= sequence.max_tokens:
            return FinishReason.LENGTH
        return None

    def _prompt_chunks(self, budget: int) -> list[tuple[Sequence, int]]:
        """Prompts that are under way, then waiting ones, and how many tokens of each."""
        chosen: list[tuple[Sequence, int]] = []
        for sequence in self._running:
            left = _to_prefill(sequence)
            if left > 0 and budget > 0:
                chosen.append((sequence, min(left, budget)))
                budget -= chosen[-1][1]
        while budget > 0 and self._waiting and len(self._running) < self._max_batch_size:
            sequence = self._waiting[0]
            needed = self.blocks.blocks_for(sequence.length)
            # A block is kept for each running sequence's next token, so that admission does not
            # push out at once what it admitted.
            if needed + len(self._running) > self.blocks.free_blocks and self._running:
                break
            if needed > self.blocks.free_blocks:
                break
            self._waiting.popleft()
            sequence.blocks = self.blocks.allocate(needed)
            self._running.append(sequence)
            chosen.append((sequence, min(sequence.length, budget)))
            budget -= chosen[-1][1]
        return chosen

    def _decoding(self) -> list[Sequence]:
        """Sequences whose prompt is computed, each with a block for its next token."""
        # A copy: growing a sequence may put a younger one, chosen already or not, back in the
        # queue.
        grown = [
            sequence
            for sequence in list(self._running)
            if sequence.blocks and _to_prefill(sequence) == 0 and self._grow(sequence)
        ]
        return [sequence for sequence in grown if sequence.blocks]

    def _grow(self, sequence: Sequence) -> bool:
        """A block for the sequence's next token, taken from the youngest if none is free."""
        while len(sequence.blocks) < self.blocks.blocks_for(sequence.length):
            if self.blocks.free_blocks:
                sequence.blocks += self.blocks.allocate(1)
                continue
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        self._waiting.appendleft(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.blocks)
        sequence.blocks = []
        sequence.alive = False

    def _step(
        self, step_id: int, chosen: list[tuple[Sequence, int]], decoding: int
    ) -> ScheduledStep:
        size = self.blocks.block_size
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
            slots += [sequence.blocks[at // size] * size + at % size for at in range(first, last)]
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


def _to_prefill(sequence: Sequence) -> int:
    """Tokens still to be computed before the sequence decodes; its newest output token aside."""
    left = sequence.length - sequence.computed
    return 0 if sequence.output and left == 1 else left


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
