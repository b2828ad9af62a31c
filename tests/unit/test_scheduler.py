"""Continuous batching and its blocks."""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from precast.errors import ContextLengthExceeded, InvalidRequest, Overloaded
from services.decode_worker.engine.kv_cache import BlockPool, OutOfBlocks
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.prompts import prompt_chunks
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import FinishReason, SamplingSpec, Sequence
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.suspects import MAX_LOSSES, MAX_LOSSES_IN_ALL
from services.decode_worker.engine.waiting import WaitingQueue
from services.decode_worker.ranks.protocol import LAST_DRAWN, DecodeOn, Step
from tests.support.full_steps import FullSteps

BLOCK = 4


def make(**changes: Any) -> Scheduler:
    values: dict[str, Any] = {
        "blocks": 16,
        "block_size": BLOCK,
        "max_batch_size": 4,
        "max_context_length": 32,
        "max_waiting": 8,
        "prefill_chunk": 8,
        "pace": Pace(0.15),
        **changes,
    }
    return Scheduler(**values)


def sequence(name: str, prompt: int = 5, max_tokens: int = 4, **sampling: object) -> Sequence:
    return Sequence(
        request_id=name,
        prompt=list(range(1, prompt + 1)),
        sampling=SamplingSpec(**sampling),  # type: ignore[arg-type]
        max_tokens=max_tokens,
        stop_token_ids=frozenset({99}),
    )


def ints(data: bytes) -> list[int]:
    values: list[int] = np.frombuffer(data, dtype=np.int32).tolist()
    return values


def ints_bytes(*values: int) -> bytes:
    return np.array(values, dtype=np.int32).tobytes()


def messages(steps: Iterable[ScheduledStep | None]) -> list[Step]:
    """Of steps that follow each other, in full."""
    ranks = FullSteps(BLOCK)
    return [ranks.full(step.message) for step in steps if step is not None]


def draw(step: ScheduledStep, token: int = 50) -> list[int]:
    return [token] * sum(step.draws)


def run(scheduler: Scheduler, limit: int = 500) -> dict[str, list[int]]:
    """Steps until nothing is left; returns each request's finished output."""
    finished = {}
    for step_id in range(limit):
        step = scheduler.schedule(step_id)
        if step is None:
            return finished
        for done, _, reason, _ in scheduler.apply(step, draw(step, 50 + step_id % 7)):
            if reason is not None:
                finished[done.request_id] = done.output
    raise AssertionError("the scheduler does not come to an end")


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    scheduler = make()
    scheduler.add(sequence("a", prompt=11, max_tokens=2))
    first = scheduler.schedule(0)
    assert first is not None and (first.decoding, first.prompt_tokens) == (0, 8)
    assert ints(first.message.positions) == list(range(8))
    assert ints(first.message.draws) == [0]
    assert first.sampling == ()
    scheduler.apply(first, [])
    second = scheduler.schedule(1)
    assert second is not None
    assert ints(second.message.token_ids) == [9, 10, 11]
    assert ints(second.message.context_lens) == [11]
    assert ints(second.message.sampling_slots) == [second.sampling[0].slot]
    scheduler.apply(second, [50])
    third = scheduler.schedule(2)
    assert third is not None and (third.decoding, third.prompt_tokens) == (1, 0)
    assert (ints(third.message.token_ids), ints(third.message.positions)) == ([50], [11])
    (outcome,) = scheduler.apply(third, [51])
    assert outcome[2] is FinishReason.LENGTH
    assert scheduler.schedule(3) is None
    assert scheduler.blocks.free_blocks == 16


def test_slots_are_where_the_block_table_says() -> None:
    scheduler = make()
    scheduler.add(sequence("a", prompt=6))
    scheduler.add(sequence("b", prompt=2))
    step = scheduler.schedule(0)
    assert step is not None
    tables = np.array(ints(step.message.block_tables)).reshape(-1, step.message.block_table_width)
    expected = [
        tables[row, at // BLOCK] * BLOCK + at % BLOCK
        for row, count in enumerate(step.counts)
        for at in range(count)
    ]
    assert ints(step.message.slots) == expected
    assert ints(step.message.query_starts) == [0, 6, 8]


def test_a_long_prompt_runs_beside_what_decodes() -> None:
    scheduler = make(max_context_length=64, blocks=32)
    scheduler.add(sequence("short", prompt=2, max_tokens=20))
    step = scheduler.schedule(0)
    assert step is not None
    scheduler.apply(step, [50])
    scheduler.add(sequence("long", prompt=40, max_tokens=2))
    steps = []
    for step_id in range(1, 8):
        step = scheduler.schedule(step_id)
        assert step is not None
        steps.append(([s.request_id for s in step.sequences], step.counts, step.decoding))
        assert ints(step.message.query_starts) == [0, *itertools.accumulate(step.counts)]
        scheduler.apply(step, draw(step))
    both = ["short", "long"]
    assert steps == [(both, (1, 7), 1)] * 5 + [(both, (1, 5), 1), (both, (1, 1), 2)]


def test_prompts_go_on_however_many_decode() -> None:
    scheduler = make(max_context_length=64, blocks=64, prefill_chunk=2)
    for name in "abc":
        scheduler.add(sequence(name, prompt=1, max_tokens=40))
    for step_id in range(4):
        step = scheduler.schedule(step_id)
        assert step is not None
        scheduler.apply(step, draw(step))
    scheduler.add(sequence("d", prompt=9))
    step = scheduler.schedule(5)
    assert step is not None
    assert (step.decoding, step.counts) == (3, (1, 1, 1, 1))


def test_stop_token_ends_with_stop() -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    step = scheduler.schedule(0)
    assert step is not None
    (outcome,) = scheduler.apply(step, [99])
    assert (outcome.token, outcome.finished) == (99, FinishReason.STOP)


def test_the_context_window_ends_with_length() -> None:
    scheduler = make(max_context_length=8)
    scheduler.add(sequence("a", prompt=6, max_tokens=100))
    assert {name: len(out) for name, out in run(scheduler).items()} == {"a": 2}


def test_preemption_loses_nothing() -> None:
    """Blocks for two sequences at most: four run to their ends with the outputs they would have."""
    scheduler = make(blocks=8, max_context_length=24)
    for name in "abcd":
        scheduler.add(sequence(name, prompt=7, max_tokens=12))
    finished = run(scheduler)
    assert {name: len(out) for name, out in finished.items()} == dict.fromkeys("abcd", 12)
    assert scheduler.blocks.free_blocks == 8


def test_bounds_are_refused_with_numbers() -> None:
    scheduler = make(max_waiting=1)
    with pytest.raises(ContextLengthExceeded, match=r"32 tokens.*32"):
        scheduler.add(sequence("long", prompt=32))
    scheduler.add(sequence("a"))
    with pytest.raises(Overloaded, match="1 requests"):
        scheduler.add(sequence("b"))


def test_abort_between_schedule_and_apply() -> None:
    scheduler = make()
    scheduler.add(sequence("a"))
    step = scheduler.schedule(0)
    assert step is not None
    assert scheduler.abort("a") is not None
    assert scheduler.blocks.free_blocks == 16
    assert scheduler.apply(step, [50]) == []
    assert scheduler.abort("a") is None


def test_a_lost_cache_puts_what_ran_back_in_front_of_the_queue() -> None:
    scheduler = make(max_batch_size=2)
    for number, name in enumerate("abc"):
        one = sequence(name)
        one.prompt[0] += 10 * number
        scheduler.add(one)
    for step_id in range(2):
        step = scheduler.schedule(step_id)
        assert step is not None
        scheduler.apply(step, draw(step))
    step = scheduler.schedule(2)
    assert scheduler.lose_cache(step) == []
    assert (scheduler.running, scheduler.waiting, scheduler.blocks.free_blocks) == (0, 3, 16)
    again = scheduler.schedule(3)
    assert again is not None
    assert [s.request_id for s in again.sequences] == ["a", "b"]
    assert again.counts == (2, 6)
    assert ints(again.message.token_ids) == [1, 2, 11, 2, 3, 4, 5, 50]  # with what it had generated
    scheduler.apply(again, draw(again))
    rest = scheduler.schedule(4)
    assert rest is not None
    assert ints(rest.message.token_ids) == [50, 3, 4, 5, 50, 50]
    scheduler.apply(rest, draw(rest))
    assert {name: len(out) for name, out in run(scheduler).items()} == dict.fromkeys("abc", 4)


def test_lost_steps_are_computed_again_and_nothing_else() -> None:
    scheduler = make(prefill_chunk=64)
    scheduler.add(sequence("a", prompt=6, max_tokens=6))
    first = scheduler.schedule(0)
    assert first is not None
    scheduler.apply(first, [50])
    second, third = scheduler.schedule(1), scheduler.schedule(2)  # sent ahead
    assert second is not None and third is not None
    assert scheduler.lose_steps(second) == []
    assert (scheduler.running, scheduler.waiting) == (1, 0)
    again = scheduler.schedule(3)
    assert again is not None
    assert isinstance(again.message, Step)
    assert (again.prompt_tokens, again.counts) == (0, (1,))
    assert ints(again.message.token_ids) == [50]
    assert ints(again.message.positions) == [6]
    assert ints(again.message.drawn) == [1]
    assert len(again.sampling) == 1  # the next ranks don't know yet how it draws
    scheduler.apply(again, [51])
    assert {name: output[:2] for name, output in run(scheduler).items()} == {"a": [50, 51]}


def test_a_chunk_of_a_prompt_that_is_lost_is_shared_with_nobody() -> None:
    scheduler = make(prefill_chunk=8, blocks=32)
    scheduler.add(sequence("a", prompt=14, max_tokens=1))
    step = scheduler.schedule(0)
    assert step is not None
    scheduler.lose_steps(step)
    scheduler.add(sequence("b", prompt=14, max_tokens=1))
    step = scheduler.schedule(1)
    assert step is not None
    assert [one.request_id for one in step.sequences] == ["a"]  # b waits for what a computes
    assert ints(step.message.positions) == list(range(8))


def test_a_sequence_that_was_there_at_each_loss_is_given_up() -> None:
    scheduler = make(max_batch_size=1)
    scheduler.add(sequence("suspect"))
    scheduler.add(sequence("waiting"))
    for loss in range(MAX_LOSSES):
        step = scheduler.schedule(0)
        lost = scheduler.lose_cache(step)
        assert [s.request_id for s in lost] == (["suspect"] if loss == MAX_LOSSES - 1 else [])
    assert scheduler.lose_cache(None) == []  # between two steps: nobody's fault
    assert list(run(scheduler)) == ["waiting"]


def test_what_ends_the_ranks_takes_nobody_with_it() -> None:
    """Steps with the poison in them are lost; the others were there at each of the first two."""
    scheduler = make(max_batch_size=4, prefill_chunk=64, blocks=32)
    for number, name in enumerate(("first", "poison", "last")):
        one = sequence(name)
        one.prompt[0] += 10 * number
        scheduler.add(one)
    losses = 0
    outputs = dict[str, list[int]]()
    while scheduler.running + scheduler.waiting:
        step = scheduler.schedule(0)
        assert step is not None
        if any(s.request_id == "poison" for s in step.sequences):
            losses += 1
            given_up = scheduler.lose_cache(step)
            assert [s.request_id for s in given_up] == ["poison"] * (losses == MAX_LOSSES)
            continue
        for done, _, reason, _ in scheduler.apply(step, draw(step)):
            outputs |= {done.request_id: done.output} if reason is not None else {}
    assert losses == MAX_LOSSES
    assert {name: len(output) for name, output in outputs.items()} == {"first": 4, "last": 4}


def test_ranks_that_are_lost_again_and_again_end_no_sequence_that_gets_on() -> None:
    scheduler = make(max_batch_size=2, prefill_chunk=64)
    for name in "ab":
        scheduler.add(sequence(name, max_tokens=MAX_LOSSES_IN_ALL // 2))
    losses = 0
    while scheduler.running + scheduler.waiting:
        step = scheduler.schedule(0)
        assert step is not None
        scheduler.apply(step, draw(step))
        step = scheduler.schedule(1)
        if step is not None:
            losses += 1
            assert scheduler.lose_cache(step) == []
    assert losses > MAX_LOSSES


def test_a_sequence_goes_on_behind_what_it_has_already() -> None:
    """It is prefilled with it, and draws as often as is left."""
    scheduler = make(prefill_chunk=64)
    resumed = sequence("a", prompt=5, max_tokens=4, temperature=1.0, presence_penalty=1.0)
    resumed.output, resumed.resumed = [60, 61], 2
    scheduler.add(resumed)
    step = scheduler.schedule(0)
    assert step is not None
    assert ints(step.message.token_ids) == [1, 2, 3, 4, 5, 60, 61]
    assert ints(step.message.drawn) == [2]
    assert ints(step.sampling[0].output_token_ids) == [60, 61]
    scheduler.apply(step, draw(step))
    assert run(scheduler) == {"a": [60, 61, 50, 50]}
    full = sequence("full", prompt=20, max_tokens=20)
    full.output, full.resumed = [60] * 12, 12
    with pytest.raises(InvalidRequest, match="resumed_token_ids have 32"):
        scheduler.add(full)


@pytest.mark.parametrize("blocks", [8, 16], ids=["all blocks", "blocks to spare"])
def test_where_nothing_is_generated_a_prompt_may_fill_the_context(blocks: int) -> None:
    scheduler = make(blocks=blocks)
    for name in ("a", "b"):
        whole = sequence(name, prompt=32, max_tokens=1)
        whole.prompt[0], whole.prompt_only = ord(name), True
        scheduler.add(whole)
    assert {name: len(output) for name, output in run(scheduler).items()} == {"a": 1, "b": 1}
    assert scheduler.blocks.free_blocks == blocks


def test_prompts_that_leave_no_room() -> None:
    scheduler = make()
    with pytest.raises(ContextLengthExceeded, match=r"32 tokens, .* no room is left for a token"):
        scheduler.add(sequence("full", prompt=32, max_tokens=1))
    long = sequence("long", prompt=33, max_tokens=1)
    long.prompt_only = True
    with pytest.raises(ContextLengthExceeded, match="has 33 tokens; 32 fit"):
        scheduler.add(long)


def test_how_to_draw_travels_once() -> None:
    scheduler = make()
    scheduler.add(sequence("a", presence_penalty=0.5, seed=3))
    sent = []
    for drawn in range(3):
        step = scheduler.schedule(0)
        assert step is not None
        assert ints(step.message.drawn) == [drawn]
        assert ints(step.message.draws) == [1]
        sent += step.sampling
        scheduler.apply(step, [50 + drawn])
    (message,) = sent
    assert (message.seed, message.presence_penalty) == (3, 0.5)
    assert (message.prompt_token_ids, message.output_token_ids) == (b"", b"")


def test_a_preempted_sequence_draws_on_with_what_it_had_drawn() -> None:
    """Two sequences that don't fit together: the younger one waits, and gets a slot again."""
    scheduler = make(blocks=5)
    scheduler.add(sequence("old", prompt=7, max_tokens=8))
    scheduler.add(sequence("young", prompt=7, max_tokens=8, repetition_penalty=1.5))
    young = []
    for step_id in range(60):
        step = scheduler.schedule(step_id)
        if step is None:
            break
        young += [message for message in step.sampling if message.repetition_penalty == 1.5]
        scheduler.apply(step, draw(step, 50 + step_id))
    first, again = young
    prompt = list(range(1, 8))
    assert (ints(first.prompt_token_ids), ints(first.output_token_ids)) == (prompt, [])
    assert ints(again.prompt_token_ids) == prompt
    assert ints(again.output_token_ids)


def test_a_step_is_scheduled_before_the_draws_of_the_last_are_known() -> None:
    scheduler = make()
    scheduler.add(sequence("a", max_tokens=3))
    steps = [scheduler.schedule(number) for number in range(4)]
    assert steps[3] is None  # whatever is drawn, it ends with the third
    given = [(ints(message.token_ids), ints(message.drawn)) for message in messages(steps)]
    assert given == [([1, 2, 3, 4, 5], [0]), ([LAST_DRAWN], [1]), ([LAST_DRAWN], [2])]
    for step in steps[:3]:
        assert step is not None
        ended = scheduler.apply(step, draw(step))
    assert ended[0][2] is FinishReason.LENGTH


def test_the_same_batch_decodes_on_by_a_command_of_a_few_bytes() -> None:
    """Only blocks that are new are sent. Whatever else is to be done makes a step anew."""
    scheduler, ranks = make(blocks=40), FullSteps(BLOCK)
    scheduler.add(sequence("a", prompt=3, max_tokens=20))
    scheduler.add(sequence("b", prompt=5, max_tokens=20))
    steps, contexts, blocks = list[ScheduledStep](), list[list[int]](), list[int]()
    for number in range(10):
        if number == 6:
            scheduler.add(sequence("c", prompt=1, max_tokens=1))
        step = scheduler.schedule(number)
        assert step is not None
        if steps:
            scheduler.apply(steps[-1], draw(steps[-1]))  # one behind, as the engine does it
        steps.append(step)
        contexts.append(ints(ranks.full(step.message).context_lens)[:2])
        if isinstance(step.message, DecodeOn):
            blocks += ints(step.message.blocks)[::2]
    short = [isinstance(step.message, DecodeOn) for step in steps]
    assert short == [False] * 2 + [True] * 4 + [False] * 3 + [True]
    assert contexts[:8] == [[3 + number, 5 + number] for number in range(8)]
    assert blocks == [0, 1]  # for a's fifth position, then for b's ninth


def test_a_sequence_that_ends_is_in_the_next_step_once_more() -> None:
    scheduler = make()
    scheduler.add(sequence("a", max_tokens=9))
    first, second = scheduler.schedule(0), scheduler.schedule(1)
    assert first is not None and second is not None
    assert [one.finished for one in scheduler.apply(first, [99])] == [FinishReason.STOP]
    assert scheduler.schedule(2) is None
    assert scheduler.apply(second, [7]) == []
    assert scheduler.blocks.free_blocks == 16


def test_a_sequence_that_was_preempted_waits_for_its_token() -> None:
    """It has to be prefilled with that."""
    scheduler = make(blocks=5)
    old, young = sequence("old", prompt=7, max_tokens=8), sequence("young", prompt=7, max_tokens=8)
    young.prompt[0] = 9
    scheduler.add(old)
    scheduler.add(young)
    steps = []
    while young.blocks or not steps:
        step = scheduler.schedule(len(steps))
        assert step is not None
        steps.append(step)
    assert young.drawing
    scheduler.abort("old")
    assert scheduler.schedule(9) is None
    for step in steps:
        scheduler.apply(step, draw(step))
    assert {name: len(out) for name, out in run(scheduler).items()} == {"young": 8}


def test_only_plain_sequences_need_no_logits() -> None:
    assert SamplingSpec().is_likeliest(0)
    assert SamplingSpec(top_p=0.5, top_k=3, min_p=0.1).is_likeliest(0)
    early = SamplingSpec(min_tokens=3)
    assert [early.is_likeliest(drawn) for drawn in (0, 2, 3)] == [False, False, True]
    changes: list[dict[str, object]] = [
        {"temperature": 0.1},
        {"logprobs": 0},
        {"bias_token_ids": ints_bytes(2), "bias_values": b"0000"},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"repetition_penalty": 1.1},
        {"min_tokens": 1},
    ]
    for changed in changes:
        scheduler = make()
        scheduler.add(sequence("plain"))
        scheduler.add(sequence("other", prompt=2, **changed))
        step = scheduler.schedule(0)
        assert step is not None
        assert not step.message.greedy, changed


def test_the_pool_takes_nothing_when_it_can_not_give_all() -> None:
    pool = BlockPool(3, BLOCK)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    assert pool.free_blocks == 1


PREFIXES = ([7] * 16, [8, 9] * 8)


def following(tokens: tuple[int, ...]) -> int:
    """What a model with little to say goes on with; it repeats itself, mostly."""
    return 99 if sum(tokens) % 23 == 0 else 1 + (tokens[-1] + len(tokens) // 11) % 3


class Traffic(RuleBasedStateMachine):
    """Random traffic over a simulated cache: each block holds what its reader thinks it does, none
    leaks or is written by two, nobody starves, and each sequence ends once."""

    BLOCKS, CONTEXT, CHUNK = 9, 20, 5

    def __init__(self) -> None:
        super().__init__()
        self.pace = Pace(0.1)
        self.scheduler = make(
            blocks=self.BLOCKS,
            max_context_length=self.CONTEXT,
            prefill_chunk=self.CHUNK,
            pace=self.pace,
            graph_sizes=lambda: (1, 2, 4, 8),
        )
        self.live: dict[str, Sequence] = {}
        self.ended: set[str] = set()
        self.cache: dict[int, tuple[int, ...]] = {}
        """By slot: the tokens that its keys and values depend on."""
        self.under_way: list[tuple[ScheduledStep, list[int], list[int]]] = []
        """Scheduled, and computed in the simulated cache, with draws that nobody knows yet and the
        cache's slots that they write."""
        self.last: dict[int, tuple[int, ...]] = {}
        """By sampling slot: all tokens of its sequence with the one drawn last."""
        self.told: dict[int, int] = {}
        """Seeds that a rank knows, by slot."""
        self.ranks = FullSteps(BLOCK)

    @rule(
        prefix=st.sampled_from([[], *PREFIXES]),
        cut=st.integers(0, 16),
        own=st.lists(st.integers(1, 3), min_size=1, max_size=8),
        tokens=st.integers(1, 12),
        copies=st.sampled_from([1, 1, 3]),
        priority=st.sampled_from([0, 0, 0, -1, 7]),
    )
    def add(
        self,
        prefix: list[int],
        cut: int,
        own: list[int],
        tokens: int,
        copies: int,
        priority: int,
    ) -> None:
        for _ in range(copies):
            number = len(self.live) + len(self.ended)
            new = sequence(f"r{number}", 1, tokens, seed=number)
            new.prompt = (prefix[:cut] + own)[: self.CONTEXT - 1]
            new.priority = priority
            try:
                self.scheduler.add(new)
            except Overloaded:
                return
            self.live[new.request_id] = new

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.live:
            name = data.draw(st.sampled_from(sorted(self.live)))
            assert self.scheduler.abort(name) is not None
            self.end(name)

    @rule()
    def schedule(self) -> None:
        if len(self.under_way) == 3:
            return
        step = self.scheduler.schedule(0)
        if step is None:
            assert not self.live or self.under_way, "work is left, but nothing is done"
            return
        assert step.prompt_tokens <= self.CHUNK
        message = self.ranks.full(step.message)
        self.tell(step, message)
        self.under_way.append((step, self.compute(step, message), ints(message.slots)))

    def tell(self, step: ScheduledStep, message: Step) -> None:
        """What the first rank knows of how to draw: each slot is its sequence's."""
        self.told |= {start.slot: start.seed for start in step.sampling}
        rows = zip(ints(message.sampling_slots), step.draws, step.sequences, strict=True)
        for slot, draws, one in rows:
            assert not draws or self.told[slot] == one.sampling.seed

    def compute(self, step: ScheduledStep, message: Step) -> list[int]:
        """What the ranks do: write the new tokens, read all of them, draw."""
        drawn = list[int]()
        assert len(set(ints(message.slots))) == step.tokens
        slots, given = iter(ints(message.slots)), iter(ints(message.token_ids))
        columns = (message.context_lens, message.sampling_slots, message.draws, message.drawn)
        for one, *row in zip(step.chosen, *map(ints, columns), strict=True):
            context, slot, draws, before = row
            first = context - one.tokens
            new = [next(given) for _ in range(one.tokens)]
            known = one.sequence.tokens(0, first)
            whole = self.last[slot] if new == [LAST_DRAWN] else (*known, *new)
            assert len(whole) == context <= self.CONTEXT
            assert LAST_DRAWN not in whole
            assert before + draws <= one.sequence.max_tokens
            for at in range(first, context):
                self.cache[next(slots)] = whole[: at + 1]
            for at in range(context):
                place = one.sequence.blocks[at // BLOCK] * BLOCK + at % BLOCK
                assert self.cache[place] == whole[: at + 1], (one, at)
            for end in range(context - draws + 1, context + 1):
                drawn.append(following(whole[:end]))
                self.last[slot] = (*whole[:end], drawn[-1])
        return drawn

    @rule(seconds=st.floats(0.001, 1.0))
    def apply(self, seconds: float) -> None:
        if not self.under_way:
            return
        step, tokens, _ = self.under_way.pop(0)
        self.pace.observe(step.decode_tokens, step.prompt_tokens, seconds)
        for done, _, reason, _ in self.scheduler.apply(step, tokens):
            whole = (*done.prompt, *done.output)
            assert whole[-1] == following(whole[:-1]), "not what it draws by itself"
            if reason is not None:
                assert (reason is FinishReason.STOP) == (whole[-1] == 99)
                full = len(done.output) == done.max_tokens or len(whole) == self.CONTEXT
                assert full or reason is FinishReason.STOP
                self.end(done.request_id)

    @rule()
    def fail(self) -> None:
        self.lose_ranks(self.scheduler.lose_cache(self.running_step()))
        self.cache.clear()

    @rule()
    def fail_and_come_back(self) -> None:
        """To a cache in which nobody knows what the steps under way have written."""
        unsure = [slot for _, _, slots in self.under_way for slot in slots]
        running = [one for one in self.live.values() if one.blocks]
        prompts = [one.written for one in running]
        self.lose_ranks(self.scheduler.lose_steps(self.running_step()))
        self.cache |= dict.fromkeys(unsure, ())
        for one, written in zip(running, prompts, strict=True):
            assert one.computed == written or one.losses >= 2, "it is computed again"

    def running_step(self) -> ScheduledStep | None:
        return self.under_way[0][0] if self.under_way else None

    def lose_ranks(self, given_up: list[Sequence]) -> None:
        for lost in given_up:
            assert lost.losses == MAX_LOSSES or lost.losses_in_all == MAX_LOSSES_IN_ALL
            self.end(lost.request_id)
        self.under_way.clear()
        self.told.clear()
        self.last.clear()

    def end(self, name: str) -> None:
        del self.live[name]
        assert name not in self.ended
        self.ended.add(name)

    @invariant()
    def blocks_add_up(self) -> None:
        pool = self.scheduler.blocks
        held = Counter(block for one in self.live.values() for block in one.blocks)
        assert dict(held) == {b: n for b, n in enumerate(pool._holders) if n}
        assert len(held) + pool.free_blocks == self.BLOCKS
        assert set(pool._published.values()) == set(pool._key_of)
        assert set(pool._kept) == set(pool._key_of) - set(held)

    def teardown(self) -> None:
        """Everything ends when nothing more comes, in no more steps than its tokens take."""
        left = sum(2 * len(one.prompt) + 3 * one.max_tokens for one in self.live.values()) + 2
        for _ in range(left * 3):
            self.schedule()
            self.apply(0.01)
        assert not self.live
        assert self.scheduler.blocks.free_blocks == self.BLOCKS

    @invariant()
    def slots_are_of_one_sequence_each(self) -> None:
        held = [s.slot for s in self.live.values() if s.blocks]
        assert len(held) == len(set(held)) == self.scheduler.running
        assert set(held) <= set(range(4))


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=200,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    scheduler = make(max_context_length=4096, blocks=2048, prefill_chunk=256)
    scheduler.add(sequence("long", prompt=4000))
    step = scheduler.schedule(0)
    assert step is not None
    scheduler.apply(step, draw(step))
    short = sequence("short", prompt=100)
    short.prompt = [5] * 100
    scheduler.add(short)
    for number in range(1, 3):
        step = scheduler.schedule(number)
        assert step is not None
        scheduler.apply(step, draw(step))
        assert step.counts == (256 // 4, 100)
        if short.output:
            break
    assert number == 1
    assert len(run(scheduler)) == 2


def test_a_long_prompt_goes_on_while_short_ones_keep_coming() -> None:
    scheduler = make(max_context_length=4096, blocks=2048, prefill_chunk=256, max_waiting=64)
    scheduler.add(sequence("long", prompt=4000, max_tokens=1))
    for number in range(4000 // 64 + 1):
        short = sequence(f"short-{number}", max_tokens=1)
        short.prompt = [number + 1] * 200
        scheduler.add(short)
        step = scheduler.schedule(number)
        assert step is not None
        ended = scheduler.apply(step, draw(step))
        if any(done.request_id == "long" for done, *_ in ended):
            return
    raise AssertionError("the long prompt starves")


def test_a_short_request_behind_a_long_prompt_gets_its_token_in_time() -> None:
    """Sent at any moment of 4,000 tokens' prefill, on a machine that computes 690 tokens a second:
    it waits for a step, which is scheduled shortly before the last one ends, and for its own."""
    token_s, fixed_s, ahead = 1 / 690, 0.004, 0.15
    for arrives in np.linspace(0.3, 4.0, 38):
        pace = Pace(0.1)
        scheduler = make(max_context_length=8192, blocks=4096, prefill_chunk=256, pace=pace)
        scheduler.add(sequence("long", prompt=4000, max_tokens=2))
        pace.observe(0, 256, 256 * token_s)
        clock, takes = 0.0, 0.0
        short = sequence("short", prompt=8, max_tokens=1)
        short.prompt = [9] * 8
        while not short.output:
            if clock - ahead * takes >= arrives and short not in (*scheduler._running,):
                scheduler.add(short)
            step = scheduler.schedule(0)
            assert step is not None
            takes = fixed_s + step.tokens * token_s
            clock += takes
            pace.observe(step.decode_tokens, step.prompt_tokens, takes)
            scheduler.apply(step, draw(step))
        assert clock - arrives <= 0.3


@given(
    prompts=st.lists(st.integers(1, 500), min_size=1, max_size=20),
    budget=st.integers(1, 300),
    alone=st.booleans(),
)
def test_every_step_goes_on_with_the_oldest_prompt_and_the_shortest(
    prompts: list[int], budget: int, alone: bool
) -> None:
    sequences = [sequence(f"{number}", prompt=size) for number, size in enumerate(prompts)]
    chosen = prompt_chunks(sequences, budget, alone=alone)
    counts = {one.sequence.request_id: one.count for one in chosen}
    assert sum(counts.values()) <= budget
    assert all(0 < count <= prompts[int(name)] for name, count in counts.items())
    assert counts["0"] >= min(prompts[0], max(1, budget // 4))
    shortest = min(range(len(prompts)), key=prompts.__getitem__)
    share = budget - max(1, budget // 4) if shortest else budget
    assert counts.get(f"{shortest}", 0) >= min(prompts[shortest], share)
    if not alone:
        assert sum(counts.values()) == min(budget, sum(prompts))


def test_a_higher_priority_gets_the_next_slot_and_equals_take_turns() -> None:
    scheduler = make(max_batch_size=1, max_waiting=8)
    for name, priority in (("a", 0), ("b", 0), ("low", -5), ("high", 3), ("high2", 3), ("c", 0)):
        one = sequence(name, prompt=3, max_tokens=2)
        one.priority = priority
        scheduler.add(one)
    assert list(run(scheduler)) == ["high", "high2", "a", "b", "c", "low"]


def test_blocks_are_taken_from_the_youngest_of_the_lowest_priority() -> None:
    scheduler = make(blocks=5)
    for name, priority in (("low", -1), ("usual", 0)):
        one = sequence(name, prompt=7, max_tokens=8)
        one.prompt[0] = ord(name[0])
        one.priority = priority
        scheduler.add(one)
    assert list(run(scheduler)) == ["usual", "low"]


@given(st.lists(st.tuples(st.sampled_from(["add", "back", "take"]), st.integers(-2, 2))))
def test_the_waiting_queue_is_a_stable_order_by_priority(actions: list[tuple[str, int]]) -> None:
    queue, model = WaitingQueue(), list[Sequence]()
    for number, (action, priority) in enumerate(actions):
        if action == "take":
            if model:
                assert queue.first is model[0]
                queue.remove(model.pop(0))
        else:
            one = sequence(f"{number}")
            one.priority = priority
            (queue.append if action == "add" else queue.put_back)(one)
            model.insert(len(model) if action == "add" else 0, one)
            model.sort(key=lambda each: -each.priority)
        assert list(queue) == model
        assert len(queue) == len(model)


def test_prompts_beside_decoding_take_no_longer_than_the_gap() -> None:
    pace = Pace(0.150)
    scheduler = make(max_context_length=8192, blocks=4096, prefill_chunk=256, pace=pace)
    for name in "abc":
        scheduler.add(sequence(name, prompt=2, max_tokens=200))
    scheduler.add(sequence("long", prompt=3000))
    times = []
    for number in range(100):
        step = scheduler.schedule(number)
        assert step is not None
        # what a step really takes: more for each token, the further the prompt has come
        context = max(s.computed for s in step.sequences)
        seconds = 0.06 + 0.002 * step.decoding + step.prompt_tokens * (1 + context / 3000) * 1e-3
        if step.decoding and step.prompt_tokens:
            times.append(seconds)
        pace.observe(step.decoding, step.prompt_tokens, seconds)
        scheduler.apply(step, draw(step))
    assert len(times) > 10
    assert max(times) <= 0.150
    assert sum(times) / len(times) > 0.08, "the gap is not used"


def test_prompts_beside_quick_decoding_take_less_than_the_gap() -> None:
    """In proportion to what decoding alone takes; but where that is next to nothing, enough for
    steps that are worth it."""
    for decode_s, gap_s in ((0.020, 0.050), (0.002, 0.045), (0.080, 0.150)):
        pace = Pace(0.150)
        pace.observe(4, 0, decode_s)
        pace.observe(4, 100, decode_s + 0.1)
        tokens = pace.prompt_tokens(4)
        assert 0.7 * gap_s < decode_s + 0.001 * tokens <= gap_s


def test_drafts_are_part_of_the_gap_and_leave_prompts_half_of_it() -> None:
    pace = Pace(0.150)
    scheduler = make(
        max_context_length=8192,
        blocks=4096,
        prefill_chunk=256,
        pace=pace,
        graph_sizes=lambda: (1, 2, 4, 8, 16),
    )
    for name in "ab":
        scheduler.add(sequence(name, prompt=2, max_tokens=2000))
    times, prompts = [], list[int]()
    for number in range(80):
        if number == 20:
            scheduler.add(sequence("long", prompt=3000))
        step = scheduler.schedule(number)
        assert step is not None
        seconds = 0.02 + 0.004 * step.decode_tokens + 0.001 * step.prompt_tokens
        if step.decode_tokens > step.decoding and step.prompt_tokens:
            times.append(seconds)
            prompts.append(step.prompt_tokens)
        pace.observe(step.decode_tokens, step.prompt_tokens, seconds)
        scheduler.apply(step, draw(step))  # the same token again and again, as drafts have it
    assert len(times) > 10
    assert max(times) <= 0.150
    assert min(prompts[20:-1]) >= 40  # once it is known what they cost


def test_one_prompt_of_eight_choices_is_computed_once() -> None:
    scheduler = make(max_context_length=4096, blocks=2048, max_batch_size=8, prefill_chunk=256)
    choices = [sequence(f"n{number}", prompt=4001, max_tokens=2) for number in range(8)]
    for one in choices:
        scheduler.add(one)
    prompt_tokens = 0
    for number in range(60):
        step = scheduler.schedule(number)
        if step is None:
            break
        prompt_tokens += step.prompt_tokens
        scheduler.apply(step, draw(step))
    assert all(len(one.output) == 2 for one in choices)
    assert prompt_tokens == 4001 + 7 * 1  # the last token has to be computed for each
    assert [one.cached for one in choices] == [0] + [4000] * 7


def test_a_prompt_that_was_there_before_is_not_computed_again() -> None:
    scheduler = make(blocks=16)
    scheduler.add(sequence("first", prompt=14, max_tokens=1))
    run(scheduler)
    again = sequence("again", prompt=14, max_tokens=1)
    scheduler.add(again)
    step = scheduler.schedule(0)
    assert step is not None
    assert ints(step.message.positions) == [12, 13]
    assert again.cached == 12
    assert ints(step.message.context_lens) == [14]


def test_two_salts_share_nothing() -> None:
    """Neither with each other nor with what has none; the same salt does."""
    scheduler = make(blocks=64, max_batch_size=8, prefill_chunk=64)
    cached = []
    for salt in ("", "a", "b", "\u00e9", "a", "", "b"):
        one = sequence(f"{len(cached)}", prompt=14, max_tokens=1)
        one.cache_salt = salt
        scheduler.add(one)
        run(scheduler)
        cached.append(one.cached)
    assert cached == [0, 0, 0, 0, 12, 12, 12]


def test_two_salts_share_nothing_while_both_run() -> None:
    scheduler = make(blocks=64, max_batch_size=8, prefill_chunk=64)
    ones = [sequence(f"n{number}", prompt=14, max_tokens=1) for number in range(4)]
    for one, salt in zip(ones, ("a", "b", "a", ""), strict=True):
        one.cache_salt = salt
        scheduler.add(one)
    run(scheduler)
    assert [one.cached for one in ones] == [0, 0, 12, 0]


def test_no_salt_stands_for_another_sequences_tokens() -> None:
    """A salt that is the bytes of a key, or of tokens, is still a salt."""
    plain = sequence("plain", prompt=8)
    for salt in (ints_bytes(1, 2, 3, 4).decode(), "\0"):
        one = sequence("one", prompt=8)
        one.cache_salt = salt
        keys = {one.block_key(index, BLOCK) for index in range(2)}
        assert keys.isdisjoint(plain.block_key(index, BLOCK) for index in range(2))


def test_kept_blocks_go_before_anyone_waits() -> None:
    scheduler = make(blocks=8, max_context_length=32)
    scheduler.add(sequence("first", prompt=20, max_tokens=1))
    run(scheduler)
    other = sequence("other", max_tokens=2)
    other.prompt = [9] * 28
    scheduler.add(other)
    assert list(run(scheduler)) == ["other"]


def test_a_lost_cache_is_shared_with_nobody() -> None:
    scheduler = make()
    scheduler.add(sequence("first", prompt=14, max_tokens=1))
    run(scheduler)
    scheduler.lose_cache(None)
    again = sequence("again", prompt=14, max_tokens=1)
    scheduler.add(again)
    step = scheduler.schedule(0)
    assert step is not None
    assert (again.cached, step.counts) == (0, (8,))
