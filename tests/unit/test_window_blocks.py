"""Blocks of layers that attend to a window: random traffic, and what a hit needs."""

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from services.decode_worker.engine.sequence import Sequence
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.engine.windows import WindowBlocks
from services.decode_worker.ranks.protocol import Step
from tests.unit import test_scheduler
from tests.unit.test_scheduler import BLOCK, draw, ints, make, sequence

WINDOW = 6


def windows(total: int = 16) -> WindowBlocks:
    return WindowBlocks(total, BLOCK, WINDOW, key_block=BLOCK)


class WindowTraffic(test_scheduler.Traffic):
    """The same traffic, in which layers with a window have blocks of their own, too few of them."""

    CHUNK = 11
    WINDOW_BLOCKS = 6

    def __init__(self) -> None:
        super().__init__()
        self.windows = windows(self.WINDOW_BLOCKS)
        self.scheduler = make(
            blocks=self.BLOCKS,
            max_context_length=self.CONTEXT,
            prefill_chunk=self.CHUNK,
            pace=self.pace,
            graph_sizes=lambda: (1, 2, 4, 8),
            windows=self.windows,
        )
        self.window_cache: dict[int, tuple[int, ...]] = {}
        self.written: list[list[int]] = []
        """Slots of windows that steps under way write."""

    def compute(self, step: ScheduledStep, message: Step) -> list[int]:
        drawn = super().compute(step, message)
        self.written.append(ints(message.window_slots))
        assert len(set(self.written[-1])) == step.tokens
        slots, width = iter(self.written[-1]), message.block_table_width
        for row, one in enumerate(step.chosen):
            context = ints(message.context_lens)[row]
            table = ints(message.window_tables)[row * width : (row + 1) * width]
            places = [table[at // BLOCK] * BLOCK + at % BLOCK for at in range(context)]
            written = self.contents(one.sequence, context)
            for at in range(context - one.tokens, context):
                assert places[at] == next(slots)
                self.window_cache[places[at]] = written[at]
            for at in range(max(0, context - one.tokens - WINDOW + 1), context):
                assert self.window_cache[places[at]] == written[at], (one, at)
        return drawn

    def contents(self, of: Sequence, context: int) -> list[tuple[int, ...]]:
        """What its keys and values depend on, as the other layers have them by now."""
        places = [of.blocks[at // BLOCK] * BLOCK + at % BLOCK for at in range(context)]
        return [self.cache[place] for place in places]

    @rule(seconds=st.floats(0.001, 1.0))
    def apply(self, seconds: float) -> None:
        if self.under_way:
            self.written.pop(0)
        super().apply(seconds)

    @rule()
    def fail(self) -> None:
        super().fail()
        self.window_cache.clear()
        self.written.clear()

    @rule()
    def fail_and_come_back(self) -> None:
        super().fail_and_come_back()
        unsure = [slot for slots in self.written for slot in slots]
        self.window_cache |= dict.fromkeys(unsure, ())
        self.written.clear()

    @invariant()
    def window_blocks_add_up(self) -> None:
        pool = self.windows
        held = Counter(block for one in self.live.values() for block in one.window_blocks)
        assert dict(held) == {b: n for b, n in enumerate(pool._holders) if n}
        assert len(held) + pool.free_blocks == self.WINDOW_BLOCKS
        assert set(pool._kept) == set(pool._key_of) - set(held)

    def teardown(self) -> None:
        super().teardown()
        assert self.windows.free_blocks == self.WINDOW_BLOCKS


TestWindowTraffic = WindowTraffic.TestCase
TestWindowTraffic.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


def test_a_sequence_keeps_a_window_and_a_chunk_at_the_most() -> None:
    pool = windows(64)
    scheduler = make(blocks=64, max_context_length=256, windows=pool)
    scheduler.add(sequence("a", prompt=100, max_tokens=100))
    most = 0
    while (step := scheduler.schedule(0)) is not None:
        most = max(most, pool.total - pool.free_blocks)
        scheduler.apply(step, draw(step))
    assert most == (WINDOW + 8) // BLOCK + 1
    assert pool.free_blocks == 64


def test_what_a_lost_step_computed_finds_its_window_again() -> None:
    scheduler = make(blocks=64, max_context_length=64, windows=windows())
    scheduler.add(sequence("a", prompt=40))
    first, second = scheduler.schedule(0), scheduler.schedule(1)
    assert first is not None and second is not None
    scheduler.apply(first, [])
    scheduler.lose_steps(second)
    again = scheduler.schedule(2)
    assert again is not None and ints(again.message.positions)[0] == 8
    assert again.sequences[0].window_first * BLOCK <= 8 - WINDOW + 1


def test_two_long_prompts_for_which_windows_have_no_room_take_turns() -> None:
    scheduler = make(blocks=64, max_context_length=24, windows=windows(6))
    for name in ("a", "b", "c"):
        one = sequence(name, prompt=20, max_tokens=3)
        one.prompt[0] = ord(name)
        scheduler.add(one)
    assert sorted(test_scheduler.run(scheduler)) == ["a", "b", "c"]


def test_a_hit_needs_the_window_before_it_and_no_more() -> None:
    pool = windows()
    scheduler = make(blocks=32, max_context_length=64, windows=pool)
    scheduler.add(sequence("first", prompt=41, max_tokens=1))
    test_scheduler.run(scheduler)
    kept = pool._kept
    while len(kept) > 3:  # others have taken what was given up first
        pool._free.append(pool._evict())
    scheduler.add(sequence("again", prompt=41, max_tokens=1))
    step = scheduler.schedule(0)
    assert step is not None and step.sequences[0].cached == 40
    assert len(step.sequences[0].window_blocks) == 3
    scheduler.apply(step, draw(step))
    pool._free.append(pool._evict())
    pool._free.append(pool._evict())
    scheduler.add(sequence("once more", prompt=41, max_tokens=1))
    step = scheduler.schedule(1)
    assert step is not None and step.sequences[0].cached == 0
