"""Continuous batching: which sequences run in the next step, and where their tokens live.

Pure bookkeeping, without IO or clock. A sequence waits until it has a slot and blocks for its
prompt, is prefilled in chunks, then decodes one token a step together with all the others. A step
has a token of every decoding sequence, and chunks of prompts in what is left of its budget
(``prompts.py``). What a prompt shares with another is computed once (``sharing.py``). When blocks
run out, the youngest running sequence gives up its own and waits again; it is prefilled anew with
what it had generated, so nothing is lost but time.

Steps are scheduled one ahead: the next may be asked for before the draws of the last are known
(``apply``). A sequence counts as computed what a step under way computes, for steps run in order;
one that turns out to have ended was computed once too often, and nobody is told of that token. A
sequence whose next tokens can be guessed (``speculation.py``) is worth waiting for its last one:
there is no step then until that is known.
"""

from typing import NamedTuple

from precast.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from services.decode_worker.engine import suspects
from services.decode_worker.engine.decode_on import decode_on
from services.decode_worker.engine.drafter import Drafter
from services.decode_worker.engine.kv_cache import BlockPool
from services.decode_worker.engine.kv_room import KvRoom
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.prompts import prompt_chunks, unfinished_prompts
from services.decode_worker.engine.sequence import FinishReason, Sequence
from services.decode_worker.engine.speculation import Drafting, Sizes
from services.decode_worker.engine.step import Chosen, ScheduledStep, StepBatch, make_step
from services.decode_worker.engine.waiting import WaitingQueue
from services.decode_worker.engine.windows import WindowBlocks


class Outcome(NamedTuple):
    """A token that a sequence has got."""

    sequence: Sequence
    token: int
    """-1: it could not be drawn, and the sequence can't go on."""
    finished: FinishReason | None
    place: int
    """Among the step's draws."""


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
        pace: Pace,
        graph_sizes: Sizes | None = None,
        windows: WindowBlocks | None = None,
    ) -> None:
        """``graph_sizes``: steps are filled with drafts up to one of them; None: nothing is
        drafted. ``windows``: blocks of layers that attend to a window, if there are such."""
        self._kv = KvRoom(BlockPool(blocks, block_size), windows)
        self._max_batch_size = max_batch_size
        self._capacity = min(max_context_length, self._kv.capacity)
        """Tokens of prompt and completion that one sequence may have."""
        self._max_waiting = max_waiting
        self._prefill_chunk = prefill_chunk
        self._pace = pace
        self._drafter = Drafter(pace, graph_sizes, self._left_after_draws)
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []
        """Sequences with a slot, oldest first."""
        self._same: StepBatch | None = None
        """The batch of the last step, if that was all of them and may decode on."""
        self._free_slots = list(range(max_batch_size))

    @property
    def blocks(self) -> BlockPool:
        """Of layers that attend to everything."""
        return self._kv.blocks

    @property
    def windows(self) -> WindowBlocks | None:
        """Of layers that attend to a window."""
        return self._kv.windows

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def drafted(self) -> int:
        """Tokens of drafts so far."""
        return self._drafter.drafted

    @property
    def accepted(self) -> int:
        """Those of them that were right."""
        return self._drafter.accepted

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. Raises Overloaded, ContextLengthExceeded or InvalidRequest."""
        self._check_prompt(sequence)
        if sequence.output and sequence.known >= self._capacity:
            raise InvalidRequest(
                f"prompt and resumed_token_ids have {sequence.known} tokens; prompt and completion "
                f"together may have {self._capacity}"
            )
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{self._max_waiting} requests are waiting already")
        self._drafter.begin(sequence)
        self._waiting.append(sequence)

    def _check_prompt(self, sequence: Sequence) -> None:
        """Where nothing is generated, a prompt may be all that fits: the token that is drawn behind
        it is dropped, and never computed."""
        tokens, most = len(sequence.prompt), self._capacity
        if tokens > most:
            raise ContextLengthExceeded(f"the prompt has {tokens} tokens; {most} fit")
        if tokens == most and not sequence.prompt_only:
            raise ContextLengthExceeded(
                f"the prompt has {tokens} tokens, and no more than {most} fit: no room is left for "
                "a token of the completion"
            )

    def abort(self, request_id: str) -> Sequence | None:
        """Drops a sequence and frees its blocks; safe while a step with it is running."""
        for queue in (self._running, self._waiting):
            for sequence in queue:
                if sequence.request_id == request_id:
                    self._drop(sequence)
                    return sequence
        return None

    finish = abort

    def lose_steps(self, step: ScheduledStep | None) -> list[Sequence]:
        """The ranks were lost with all steps under way, but what was written to the cache before
        is there: sequences decode on with the next ranks.

        What the lost steps draw is drawn again. A suspect (``suspects.py``) is prefilled anew, for
        what it has in the cache may be what ends the ranks. One that seems to be it is dropped, and
        returned; ``step`` is the one that was running now.
        """
        self._same = None
        self._note_losses(step)
        for sequence in self._running[::-1]:
            if suspects.is_suspect(sequence):
                self._preempt(sequence)
            else:
                sequence.rewind()
        return self._drop_given_up()

    def lose_cache(self, step: ScheduledStep | None) -> list[Sequence]:
        """``lose_steps`` where the cache is lost too: everything that had a slot is put back in
        front of the queue, oldest first, and prefilled again with what it had generated."""
        self._note_losses(step)
        for sequence in self._running[::-1]:
            self._preempt(sequence)
        self._kv.lose()
        return self._drop_given_up()

    def _note_losses(self, step: ScheduledStep | None) -> None:
        for sequence in step.sequences if step is not None else ():
            suspects.note_loss(sequence)

    def _drop_given_up(self) -> list[Sequence]:
        for sequence in self._waiting:
            sequence.computing = sequence.drawing = sequence.drafted = 0
        lost = [s for s in (*self._running, *self._waiting) if suspects.is_given_up(s)]
        for sequence in lost:
            self._drop(sequence)
        return lost

    def schedule(self, step_id: int) -> ScheduledStep | None:
        """The next step, or None if there is nothing to do."""
        if self._drafter.awaits_draws(self._running):
            return None
        return self._once_more() or self._schedule_anew(step_id)

    @property
    def decodes_on(self) -> bool:
        """Whether the next step may be the last one's batch once more."""
        admits = self._waiting and len(self._running) < self._max_batch_size
        return self._same is not None and not admits

    def decode_on(self) -> ScheduledStep | None:
        """The next step if that is the last one's batch once more, and nothing else to be done."""
        if self._same is None or self._drafter.may_follow(self._same.sequences):
            return None
        return self._once_more()

    def settle(self, sequence: Sequence) -> None:
        """Steps of the sequence are over: what they have written is there to stay."""
        self._kv.settle(sequence)

    def steps_left(self, batch: StepBatch) -> int:
        """Steps that may follow those under way before one of its sequences ends for its length."""
        return min(self._left_after_draws(sequence) for sequence in batch.sequences)

    def watched(self, batch: StepBatch) -> list[tuple[int, Drafting]] | None:
        """Its sequences to which drafts may come, by their places; None: they may now."""
        return self._drafter.watched(batch.sequences)

    def _once_more(self) -> ScheduledStep | None:
        if self._same is None or not self.decodes_on:
            return None
        return decode_on(self._same, self._kv, self._left_after_draws)

    def _schedule_anew(self, step_id: int) -> ScheduledStep | None:
        self._same = None
        self._admit()
        for sequence in self._running:
            self._kv.adopt(sequence)
        chosen, decoding = self._choose()
        while not chosen and self._is_stuck():
            self._preempt(self._last_in_line())
            chosen, decoding = self._choose()
        if not chosen:
            return None
        size = self.blocks.block_size
        step = make_step(step_id, chosen, decoding=decoding, block_size=size)
        for one, draws in zip(step.chosen, step.draws, strict=True):
            one.sequence.computed += one.tokens
            one.sequence.computing += one.tokens
            one.sequence.drawing += draws
            one.sequence.drafted = len(one.draft)
        if step.batch.is_plain and len(chosen) == len(self._running):
            self._same = step.batch
        return step

    def _choose(self) -> tuple[list[Chosen], int]:
        """What the next step has in it, and how many of them, its first, decode."""
        suspect = suspects.first_suspect(self._running)
        if suspect is not None:
            alone = suspects.alone(suspect, self._prefill_chunk)
            return self._kv.fitted(alone), int(suspect.to_prefill == 0)
        decoding = self._decoding()
        prompts = unfinished_prompts(self._running, self.blocks.block_size)
        chosen = self._with_drafts(decoding, prompts=bool(prompts))
        budget = self._budget(sum(one.tokens for one in chosen))
        chunks = prompt_chunks(prompts, budget, alone=not decoding)
        return chosen + self._kv.fitted(chunks), len(decoding)

    def _is_stuck(self) -> bool:
        """Whether nobody goes on because others have the blocks: those of windows are given step
        by step."""
        if self._kv.windows is None or len(self._running) < 2:
            return False
        return not any(one.computing for one in self._running)

    def apply(self, step: ScheduledStep, token_ids: list[int]) -> list[Outcome]:
        """Takes in the draws of the oldest step under way; -1 where one could not be drawn.
        Finished sequences free their blocks."""
        if len(token_ids) != step.batch.all_draws:
            raise ValueError(f"{len(token_ids)} tokens for {step.batch.all_draws} draws")
        outcomes: list[Outcome] = []
        place = 0
        for one, draws in zip(step.chosen, step.draws, strict=True):
            one.sequence.computing -= one.tokens
            if not one.sequence.alive:
                pass  # it has ended meanwhile
            elif draws == 0:
                self._kv.settle(one.sequence)
            elif draws == 1:
                outcomes.append(self._take_one(one.sequence, place, token_ids[place]))
            else:
                outcomes += self._take(one, place, token_ids[place : place + draws])
            place += draws
        return outcomes

    def _take_one(self, sequence: Sequence, place: int, token: int) -> Outcome:
        """A sequence's only new token, without a draft."""
        sequence.drawing -= 1
        reason = self._append(sequence, token)
        self._kv.settle(sequence)
        if reason is not None:
            self._drop(sequence)
        return Outcome(sequence, token, reason, place)

    def _take(self, one: Chosen, place: int, tokens: list[int]) -> list[Outcome]:
        """A sequence's new tokens: as many as its draft was right, and one more."""
        sequence, found = one.sequence, list[Outcome]()
        sequence.drawing -= len(tokens)
        for token, guess in zip(tokens, [*one.draft, None], strict=True):
            reason = self._append(sequence, token)
            found.append(Outcome(sequence, token, reason, place + len(found)))
            if token != guess or reason is not None:
                break
        if one.draft:
            self._drafter.checked(sequence, len(one.draft), len(found) - 1)
        self._kv.settle(sequence)
        if found[-1].finished is not None:
            self._drop(sequence)
        return found

    def _append(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token < 0:
            return None
        sequence.output.append(token)
        return self._finish_reason(sequence, token)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        if token in sequence.stop_token_ids or sequence.completes(token):
            return FinishReason.STOP
        return FinishReason.LENGTH if self._is_full(sequence, len(sequence.output)) else None

    def _is_full(self, sequence: Sequence, drawn: int) -> bool:
        """Whether a sequence ends for its length with so many tokens drawn."""
        return self._left(sequence, drawn) <= 0

    def _left(self, sequence: Sequence, drawn: int) -> int:
        """Tokens that a sequence may still draw with so many drawn."""
        room = max(1, self._capacity - len(sequence.prompt))  # one is drawn of whole prompts too
        return min(sequence.max_tokens, room) - drawn

    def _admit(self) -> None:
        """Gives slots and blocks to those that have waited longest."""
        while self._waiting and len(self._running) < self._max_batch_size:
            sequence = self._waiting.first
            if sequence.computing:
                return  # it was preempted in the step under way, whose token it is prefilled with
            found = self._kv.found(sequence)
            # A block is kept for each running sequence's next token, so that admission does not
            # push out at once what it admitted.
            spare, chunk = len(self._running), self._prefill_chunk
            if spare and not self._kv.fits(sequence, found, spare=spare, chunk=chunk):
                return
            self._waiting.remove(sequence)
            self._kv.begin(sequence, found)
            sequence.slot = self._free_slots.pop()
            if sequence.is_fresh:
                sequence.cached = sequence.computed
            self._running.append(sequence)

    def _budget(self, decoding: int) -> int:
        """Tokens of prompts in a step with so many others, drafts among them. However many these
        are, half a chunk may be left to prompts; a sequence that decodes is held up no longer than
        the pace allows."""
        most = max(self._prefill_chunk - decoding, self._prefill_chunk // 2, 1)
        return min(most, self._pace.prompt_tokens(decoding))

    def _decoding(self) -> list[Sequence]:
        """Sequences whose prompt is computed, each with a block for its next token; but those whose
        last token is being drawn."""
        # A copy: growing a sequence may put a younger one, chosen already or not, back in the
        # queue.
        grown = [
            sequence
            for sequence in list(self._running)
            if sequence.blocks and sequence.to_prefill == 0 and not self._ends(sequence)
            if self._grow(sequence)
        ]
        return [sequence for sequence in grown if sequence.blocks]

    def _with_drafts(self, decoding: list[Sequence], *, prompts: bool) -> list[Chosen]:
        counts = self._drafter.counts(decoding, prompts=prompts)
        return [
            Chosen(sequence, 1, self._room(sequence, sequence.draft(count)) if count else ())
            for sequence, count in zip(decoding, counts, strict=True)
        ]

    def _room(self, sequence: Sequence, draft: list[int]) -> list[int]:
        """What of a draft there are blocks for: nobody gives up any for it."""
        room = self._kv.extend(sequence, sequence.length + len(draft))
        return draft[: room - sequence.length]

    def _left_after_draws(self, sequence: Sequence) -> int:
        return self._left(sequence, len(sequence.output) + sequence.drawing)

    def _ends(self, sequence: Sequence) -> bool:
        """Whether the token that is being drawn is its last, whatever it is."""
        return self._left_after_draws(sequence) <= 0

    def _grow(self, sequence: Sequence) -> bool:
        """A block for the sequence's next token, taken from the last in line if none is free."""
        while self._kv.extend(sequence, sequence.length) < sequence.length:
            last = self._last_in_line()
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _last_in_line(self) -> Sequence:
        """Who gives up blocks: the youngest of the lowest priority."""
        return min(reversed(self._running), key=lambda sequence: sequence.priority)

    def _preempt(self, sequence: Sequence) -> None:
        self._same = None
        self._running.remove(sequence)
        self._release(sequence)
        sequence.computed = sequence.published = 0
        self._waiting.put_back(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._same = None
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        self._retire(sequence)

    def _retire(self, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.alive = False

    def _release(self, sequence: Sequence) -> None:
        self._kv.release(sequence)
        if sequence.slot >= 0:
            self._free_slots.append(sequence.slot)
        sequence.slot, sequence.sampling_sent = -1, False
