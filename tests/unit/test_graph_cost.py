"""Which graph replays a step, and when none is better."""

import pytest

from services.decode_worker.graphs.cost import graph_for

MEASURED = {1: 10.0, 8: 24.0, 64: 136.0}
"""On one line from 8 to 64: two more for each token."""
UNKNOWN = dict.fromkeys(MEASURED, 0.0)


@pytest.mark.parametrize("costs", [MEASURED, UNKNOWN, {**MEASURED, 8: 0.0}])
def test_decode_steps_take_the_smallest_graph_that_holds_them(costs: dict[int, float]) -> None:
    chosen = [graph_for(costs, tokens, decoding=True) for tokens in (1, 2, 8, 9, 64, 65)]
    assert chosen == [1, 8, 8, 64, 64, 0]


@pytest.mark.parametrize("costs", [MEASURED, UNKNOWN, {**MEASURED, 8: 0.0}])
def test_prompts_are_padded_by_a_little_only(costs: dict[int, float]) -> None:
    chosen = [graph_for(costs, tokens, decoding=False) for tokens in (8, 40, 55, 62, 64, 65)]
    assert chosen == [8, 0, 0, 64, 64, 0]


def test_what_padding_costs_is_measured() -> None:
    flat = {32: 100.0, 64: 104.0}  # half as many tokens are hardly faster
    assert graph_for(flat, 40, decoding=False) == 64
    assert graph_for({32: 50.0, 64: 104.0}, 40, decoding=False) == 0
    assert graph_for({64: 104.0}, 40, decoding=False) == 0


def test_without_graphs_there_is_none() -> None:
    assert graph_for({}, 1, decoding=True) == graph_for({}, 9, decoding=False) == 0
