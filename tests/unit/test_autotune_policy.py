"""Which sizes are added and dropped as traffic changes."""

from collections import Counter

from services.decode_worker.graphs.autotune.policy import (
    IDLE_WINDOWS,
    AutotunePolicy,
    Change,
    kept_sizes,
)
from services.decode_worker.graphs.autotune.stats import MIN_STEPS, StepStats, Window

LINEAR = {1: 10.0, 4: 40.0, 8: 80.0, 64: 640.0}
FLAT = {1: 10.0, 4: 40.0, 8: 40.1, 64: 640.0}
"""Six cost as much as eight."""


def window(decode: dict[int, int], sizes: dict[int, float], also: tuple[int, ...] = ()) -> Window:
    """Decode steps by tokens, replayed with the smallest size that holds them, and one prompt step
    each of the sizes in ``also``."""
    replayed = Counter(also)
    for tokens, count in decode.items():
        replayed[min((s for s in sizes if s >= tokens), default=0)] += count
    return Window(decode=Counter(decode), replayed=replayed)


def policy(max_graphs: int = 8) -> AutotunePolicy:
    return AutotunePolicy(max_graphs=max_graphs, keep=kept_sizes((1, 4, 8), (64,)))


def changed(change: Change | None) -> tuple[int, bool] | None:
    return None if change is None else (change.size, change.added)


def test_a_size_is_added_where_padding_costs() -> None:
    assert changed(policy().change(LINEAR, window({1: 50, 6: 50}, LINEAR))) == (6, True)
    # five would save its own steps only, six all of both less a little
    assert changed(policy().change(LINEAR, window({5: 10, 6: 90}, LINEAR))) == (6, True)


def test_nothing_is_added_where_it_would_not_pay() -> None:
    assert policy().change(FLAT, window({6: 100}, FLAT)) is None
    assert policy().change(LINEAR, window({1: 1000, 7: 1}, LINEAR)) is None
    assert policy().change(LINEAR, window({8: 100, 1: 100}, LINEAR)) is None
    assert policy().change(LINEAR, window({65: 100}, LINEAR)) is None  # larger than any graph
    assert policy().change({}, window({6: 100}, {})) is None


def test_unmeasured_sizes_are_not_reckoned_with() -> None:
    unknown = {**LINEAR, 8: 0.0}
    assert policy().change(unknown, window({6: 100}, unknown)) is None


def test_what_nobody_uses_is_dropped_but_the_largest_stay() -> None:
    deciding, steps = policy(), window({1: 100}, LINEAR)
    for _ in range(IDLE_WINDOWS - 1):
        assert deciding.change(LINEAR, steps) is None
    assert changed(deciding.change(LINEAR, steps)) == (4, False)
    left = {size: us for size, us in LINEAR.items() if size != 4}
    assert deciding.change(left, steps) is None


def test_prompts_use_sizes_too() -> None:
    deciding = policy()
    for _ in range(2 * IDLE_WINDOWS):
        assert deciding.change(LINEAR, window({1: 100}, LINEAR, also=(4,))) is None


def test_within_the_budget_something_idle_makes_room() -> None:
    deciding = policy(max_graphs=len(LINEAR))
    steps = window({1: 100, 7: 100}, LINEAR)
    assert changed(deciding.change(LINEAR, steps)) == (4, False)
    left = {size: us for size, us in LINEAR.items() if size != 4}
    assert changed(deciding.change(left, window({1: 100, 7: 100}, left))) == (7, True)
    # nothing idle, no room: everything stays
    full = {**left, 7: 70.0}
    assert deciding.change(full, window({1: 100, 3: 100, 7: 9, 8: 9}, full)) is None


def test_traffic_is_counted_by_kind_and_padding() -> None:
    traffic = StepStats()
    assert traffic.take_window() is None
    for _ in range(MIN_STEPS - 1):
        traffic.count(3, 4, decoding=True)
    assert traffic.take_window() is None
    traffic.count(60, 0, decoding=False)
    taken = traffic.take_window()
    assert taken
    assert taken.decode == {3: MIN_STEPS - 1}
    assert taken.replayed == {4: MIN_STEPS - 1, 0: 1}
    assert (traffic.live_tokens, traffic.padding_tokens) == (3 * (MIN_STEPS - 1), MIN_STEPS - 1)
    assert traffic.prompt == {60: 1}
    assert traffic.take_window() is None
