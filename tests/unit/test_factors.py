"""Shapes to graph factors and back, and factors that contradict each other."""

import pytest

from precast.errors import InvalidRequest
from precast.graphs.factors import rank_factors, shape_from
from tests.support.compile_worker import FACTORS


@pytest.mark.parametrize(
    ("groups", "heads"), [("3,3,3", (9, 3)), ("3,2", (5, 2)), ("1", (1, 1)), ("0", (0, 0))]
)
def test_a_shape_comes_back(groups: str, heads: tuple[int, int]) -> None:
    shape = shape_from({**FACTORS, "query_groups": groups})
    assert (shape.q_heads, shape.kv_heads) == heads
    again = rank_factors(shape, block_size=32, torch_version="2.13.0+cpu")
    assert again["query_groups"] == groups
    assert shape_from({**again, "num_tokens": "1"}) == shape


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": "24576"}, "none of vocab_widths"),
        ({"tp_size": "2"}, "one entry for each of tp_size"),
        ({"query_groups": "3,0"}, "a KV head has 1 to 64 query heads"),
        ({"query_groups": "0,0"}, "a KV head has 1 to 64 query heads"),
        ({"query_groups": "65"}, "a KV head has 1 to 64 query heads"),
    ],
)
def test_factors_that_contradict_each_other(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        shape_from({**FACTORS, **changes})
