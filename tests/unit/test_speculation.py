"""Drafts out of what a sequence has had, and how much of them is worth computing."""

import pytest

from services.decode_worker.engine.pace import STALE_STEPS, Pace
from services.decode_worker.engine.speculation import (
    LOW_RATE,
    MOST,
    PAUSE,
    PLACES,
    Drafting,
    PromptLookup,
    lengths,
)

CHEAP = {1: 10.0, 2: 10.2, 4: 11.0, 8: 12.0, 16: 15.0}
"""What steps take where memory is all that they wait for."""
DEAR = {size: 10.0 * size for size in CHEAP}


def lookup_of(*tokens: int) -> PromptLookup:
    lookup = PromptLookup()
    lookup.extend(tokens)
    return lookup


def test_what_followed_the_last_tokens_before_is_drafted() -> None:
    lookup = lookup_of(1, 2, 3, 4, 5, 6, 1, 2, 3)
    assert lookup.draft(2) == [4, 5]
    assert lookup.draft(8) == [4, 5, 6, 1, 2, 3, 4, 5]
    lookup.extend([7])
    assert lookup.draft(2) == []


def test_a_text_that_goes_round_goes_on_so() -> None:
    assert lookup_of(7, 7, 7, 7).draft(3) == [7, 7, 7]
    assert lookup_of(1, 2, 1, 2, 1).draft(4) == [2, 1, 2, 1]


def test_the_place_counts_before_which_most_is_the_same() -> None:
    """Code repeats its idioms: what an edit goes on with stands behind the longer match."""
    assert lookup_of(9, 8, 1, 2, 3, 4, 7, 7, 1, 2, 3, 5, 9, 8, 1, 2, 3).draft(1) == [4]
    assert lookup_of(*[1, 2, 3, 4] * (PLACES + 2), 5, 1, 2, 3).draft(2) == [4, 5]


def test_the_latest_of_several_places_that_are_alike_counts() -> None:
    assert lookup_of(1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3).draft(1) == [5]


@pytest.mark.parametrize("tokens", [(), (1,), (1, 2, 3)])
def test_a_text_that_is_too_short_has_no_draft(tokens: tuple[int, ...]) -> None:
    assert lookup_of(*tokens).draft(4) == []


def test_drafts_that_are_mostly_wrong_pause() -> None:
    drafting = Drafting(lookup=lookup_of(1, 2, 3, 4, 1, 2, 3))
    assert drafting.draft(1) == [4]
    while drafting.draft(1):
        assert drafting.rate >= LOW_RATE
        drafting.observe(4, 0)
    drafting.lookup.extend([9] * (PAUSE - 3) + [1, 2])
    assert drafting.draft(1) == []
    drafting.lookup.extend([3, 7, 1, 2, 3])
    assert drafting.draft(1) == [7]


def test_a_rate_follows_what_was_right() -> None:
    drafting = Drafting()
    for _ in range(20):
        drafting.observe(4, 4)
    assert drafting.rate > 0.99
    drafting.observe(4, 1)  # of two that were looked at
    assert drafting.rate == pytest.approx(0.3 * 0.5 + 0.7, abs=0.01)


def test_a_sure_draft_is_computed_whole_where_steps_are_cheap() -> None:
    assert lengths([(0.95, MOST)], 1, CHEAP) == [15]
    assert lengths([(0.95, 5)], 1, CHEAP) == [5]
    assert lengths([(0.95, 5)], 1, {1: 10.0, 4: 11.0, 8: 16.0}) == [3]  # 1 + 3 fill a graph
    assert lengths([(0.2, MOST)], 1, CHEAP) == [1]


@pytest.mark.parametrize("costs", [{}, DEAR])
def test_nothing_is_drafted_that_does_not_pay(costs: dict[int, float]) -> None:
    assert lengths([(0.95, MOST)], 1, costs) == [0]


def test_the_likelier_of_two_gets_more() -> None:
    some, more = lengths([(0.7, 8), (0.9, 8)], 2, {2: 10.0, 8: 11.0})
    assert 0 < some < more


def test_others_that_decode_are_part_of_the_step() -> None:
    drafts = [(0.0, 0)] * 15 + [(0.9, MOST)]
    assert lengths(drafts, 16, {16: 15.0, 32: 29.0}) == [0] * 16
    assert lengths(drafts[-4:], 4, {4: 11.0, 8: 12.0}) == [0, 0, 0, 4]


def test_sizes_that_were_not_seen_are_guessed_to_be_cheap_until_they_are() -> None:
    pace = Pace(0.15)
    assert pace.decode_costs(1, CHEAP) == {}
    pace.observe(1, 0, 0.010)
    guessed = pace.decode_costs(1, CHEAP)
    assert lengths([(0.9, MOST)], 1, guessed) == [15]
    assert guessed[16] == pytest.approx(0.0175)
    pace.observe(16, 0, 0.100)
    assert lengths([(0.9, MOST)], 1, pace.decode_costs(1, CHEAP)) == [7]
    for _ in range(STALE_STEPS):
        pace.observe(1, 0, 0.010)
    assert lengths([(0.9, MOST)], 1, pace.decode_costs(1, CHEAP)) == [15]


def test_drafts_keep_the_gap_between_tokens() -> None:
    pace = Pace(0.100)
    pace.observe(4, 0, 0.040)
    assert sorted(pace.decode_costs(4, (1, 4, 16, 256))) == [4, 16]
    pace.observe(16, 0, 0.090)
    assert sorted(pace.decode_costs(4, (1, 4, 16, 256))) == [4]


def test_a_draft_beside_prompts_takes_what_their_tokens_do() -> None:
    pace = Pace(0.100)
    for _ in range(8):
        pace.observe(4, 0, 0.016)
        pace.observe(4, 40, 0.056)
    assert pace.decode_costs(4, (8, 16, 64))[16] < 0.026  # it was not seen: it is tried
    beside = pace.decode_costs(4, (8, 16, 64), prompts=True)
    assert sorted(beside) == [4, 8, 16]
    assert beside[16] == pytest.approx(0.016 + 12 * 0.001)
