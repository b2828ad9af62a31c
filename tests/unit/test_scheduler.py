"""Continuous batching and its blocks."""

import itertools

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from precast.errors import ContextLengthExceeded, Overloaded
from services.decode_worker.engine.kv_cache import BlockPool, OutOfBlocks
from services.decode_worker.engine.scheduler import (
    MAX_LOSSES,
    FinishReason,
    SamplingSpec,
    ScheduledStep,
    Scheduler,
    Sequence,
)

BLOCK = 4


def make(**changes: int) -> Scheduler:
    values = {
        "blocks": 16,
        "block_size": BLOCK,
        "max_batch_size": 4,
        "max_context_length": 32,
        "max_waiting": 8,
        "prefill_chunk": 8,
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


def draw(step: ScheduledStep, token: int = 50) -> list[int]:
    return [-1 if sample is None else token for sample in step.message.sample]


def run(scheduler: Scheduler, limit: int = 500) -> dict[str, list[int]]:
    """Steps until nothing is left; returns each request's finished output."""
    finished = {}
    for step_id in range(limit):
        step = scheduler.schedule(step_id)
        if step is None:
            return finished
        for done, _, reason in scheduler.apply(step, draw(step, 50 + step_id % 7)):
            if reason is not None:
                finished[done.request_id] = done.output
    raise AssertionError("the scheduler does not come to an end")


def test_a_prompt_is_prefilled_in_chunks_and_then_decoded() -> None:
    scheduler = make()
    scheduler.add(sequence("a", prompt=11, max_tokens=2))
    first = scheduler.schedule(0)
    assert first is not None and (first.decoding, first.prompt_tokens) == (0, 8)
    assert ints(first.message.positions) == list(range(8))
    assert first.message.sample == (None,)
    scheduler.apply(first, [-1])
    second = scheduler.schedule(1)
    assert second is not None
    assert ints(second.message.token_ids) == [9, 10, 11]
    assert ints(second.message.context_lens) == [11]
    assert second.message.sample[0] is not None
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
    assert outcome[1:] == (99, FinishReason.STOP)


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


def test_a_preempted_sequence_is_prefilled_with_its_output() -> None:
    scheduler = make(blocks=5, max_context_length=20, prefill_chunk=20)
    scheduler.add(sequence("old", prompt=8, max_tokens=8))
    scheduler.add(sequence("young", prompt=7, max_tokens=8))
    seen = []
    for step_id in range(60):
        step = scheduler.schedule(step_id)
        if step is None:
            break
        if step.prompt_tokens and step_id > 0:
            seen.append(ints(step.message.token_ids)[step.decoding :])
        scheduler.apply(step, draw(step, 60 + step_id))
    assert any(tokens[:7] == list(range(1, 8)) and tokens[7:] for tokens in seen)


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
    for name in "abc":
        scheduler.add(sequence(name))
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
    assert ints(again.message.token_ids)[:7] == [1, 2, 3, 4, 5, 50, 50]
    assert {name: len(out) for name, out in run(scheduler).items()} == dict.fromkeys("abc", 4)


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


def test_penalties_travel_with_what_was_generated() -> None:
    scheduler = make()
    scheduler.add(sequence("a", presence_penalty=0.5, seed=3))
    for token in (50, 51):
        step = scheduler.schedule(0)
        assert step is not None
        scheduler.apply(step, [token])
    step = scheduler.schedule(1)
    assert step is not None and step.message.sample[0] is not None
    assert ints(step.message.sample[0].output_token_ids) == [50, 51]
    assert (step.message.sample[0].step, step.message.sample[0].seed) == (2, 3)


def test_the_pool_takes_nothing_when_it_can_not_give_all() -> None:
    pool = BlockPool(3, BLOCK)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(2)
    assert pool.free_blocks == 1


class Accounting(RuleBasedStateMachine):
    """Random traffic: blocks are never leaked, shared or written twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make(blocks=9, max_context_length=20, prefill_chunk=5)
        self.live: dict[str, Sequence] = {}
        self.names = 0
        self.step: ScheduledStep | None = None

    @rule(prompt=st.integers(1, 19), tokens=st.integers(1, 12))
    def add(self, prompt: int, tokens: int) -> None:
        new = sequence(f"r{self.names}", prompt, tokens)
        self.names += 1
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
            del self.live[name]

    @rule()
    def schedule(self) -> None:
        if self.step is not None:
            return
        self.step = self.scheduler.schedule(0)
        if self.step is None:
            assert not self.live
            return
        slots = ints(self.step.message.slots)
        assert len(slots) == len(set(slots))

    @rule(token=st.integers(90, 99))
    def apply(self, token: int) -> None:
        if self.step is None:
            return
        for done, _, reason in self.scheduler.apply(self.step, draw(self.step, token)):
            if reason is not None:
                del self.live[done.request_id]
        self.step = None

    @rule()
    def fail(self) -> None:
        for lost in self.scheduler.lose_cache(self.step):
            del self.live[lost.request_id]
        self.step = None

    @invariant()
    def blocks_add_up(self) -> None:
        held = [block for s in self.live.values() for block in s.blocks]
        assert len(held) == len(set(held))
        assert len(held) + self.scheduler.blocks.free_blocks == 9


TestAccounting = Accounting.TestCase
TestAccounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
