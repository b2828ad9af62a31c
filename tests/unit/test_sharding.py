"""How a model is cut over ranks."""

import pytest

from precast.errors import ConfigError
from precast.models.config import ModelConfig
from precast.models.options import LayerPlan, LlamaOptions
from precast.models.rope import RopeConfig
from precast.models.sharding import PANEL, kv_heads_held, shard


def config(kv_heads: int = 3, group: int = 3, **changes: int) -> ModelConfig:
    sizes = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "head_dim": 64,
        **changes,
    }
    return ModelConfig(
        architecture="llama",
        layers=(LayerPlan("full"),) * 30,
        options=LlamaOptions(),
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        rms_norm_eps=1e-5,
        ropes=(RopeConfig(),),
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        eos_token_ids=(2,),
        **sizes,
    )


HEADS = [(1, 1), (2, 1), (3, 3), (4, 2), (5, 5), (6, 2), (8, 8), (9, 3), (14, 2), (15, 5), (32, 8)]
"""Query and KV heads."""


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_every_head_column_and_row_is_on_exactly_one_rank(
    q_heads: int, kv_heads: int, tp: int
) -> None:
    model = config(kv_heads, q_heads // kv_heads, vocab_size=50257, intermediate_size=1500)
    shards = [shard(model, rank, tp) for rank in range(tp)]
    for name, total in (("q_heads", q_heads), ("mlp", 1500), ("vocab", 50257)):
        ranges = [getattr(s, name) for s in shards]
        assert [i for r in ranges for i in r] == list(range(total)), name
        assert name == "q_heads" or all(len(r) > 0 for r in ranges), name
    assert all(s.vocab_widths == tuple(len(t.vocab) for t in shards) for s in shards)


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_query_heads_are_with_their_kv_heads(q_heads: int, kv_heads: int, tp: int) -> None:
    model = config(kv_heads, q_heads // kv_heads)
    shards = [shard(model, rank, tp) for rank in range(tp)]
    for part in shards:
        # The attention operator takes queries in this order.
        owners = [
            head
            for head, group in zip(part.kv_heads, part.query_groups, strict=True)
            for _ in range(group)
        ]
        assert owners == [q // (q_heads // kv_heads) for q in part.q_heads]
        assert 0 not in part.query_groups
    assert sum(len(part.kv_heads) for part in shards) == kv_heads_held(model, tp)


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize(("q_heads", "kv_heads"), HEADS)
def test_projections_are_as_even_as_heads_allow(q_heads: int, kv_heads: int, tp: int) -> None:
    """No rank has more columns, or caches more, than if whole KV heads were dealt."""
    group = q_heads // kv_heads
    shards = [shard(config(kv_heads, group), rank, tp) for rank in range(tp)]
    most = max(len(part.q_heads) + len(part.kv_heads) for part in shards)
    most_kv = -(-kv_heads // tp)
    assert max(len(part.kv_heads) for part in shards) == most_kv
    assert most <= most_kv * (group + 1)
    if tp >= q_heads:
        assert most == 2
    if kv_heads % tp == 0:
        assert {part.query_groups for part in shards} == {(group,) * (kv_heads // tp)}


@pytest.mark.parametrize("tp", range(2, 9))
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (14, 2), (15, 5), (32, 8), (5, 5)])
def test_the_mlp_is_dealt_evenly(q_heads: int, kv_heads: int, tp: int) -> None:
    model = config(kv_heads, q_heads // kv_heads, intermediate_size=8192)
    widths = [len(shard(model, rank, tp).mlp) for rank in range(tp)]
    assert max(widths) - min(widths) <= PANEL


def test_few_columns_are_dealt_one_by_one() -> None:
    model = config(2, 2, intermediate_size=24, vocab_size=20)
    assert sorted(len(shard(model, rank, 8).vocab) for rank in range(8)) == [2] * 4 + [3] * 4


def test_three_kv_heads_over_two_ranks() -> None:
    """Both hold the one in the middle: 7 and 6 pairs of heads, not 8 and 4."""
    first, second = (shard(config(), rank, 2) for rank in range(2))
    assert (first.kv_heads, first.q_heads, first.query_groups) == (range(2), range(5), (3, 2))
    assert (second.kv_heads, second.q_heads, second.query_groups) == (
        range(1, 3),
        range(5, 9),
        (1, 3),
    )


@pytest.mark.parametrize(
    ("heads", "tp", "queries"),
    [((15, 5), 2, [8, 7]), ((15, 5), 4, [4, 4, 4, 3]), ((32, 8), 3, [12, 12, 8])],
)
def test_uneven_heads(heads: tuple[int, int], tp: int, queries: list[int]) -> None:
    model = config(heads[1], heads[0] // heads[1])
    assert [len(shard(model, rank, tp).q_heads) for rank in range(tp)] == queries


def test_more_ranks_than_kv_heads() -> None:
    """Some have no attention, where that makes none of the others fuller."""
    parts = [shard(config(), rank, 4) for rank in range(4)]
    assert [part.query_groups for part in parts] == [(3,), (3,), (3,), ()]
    parts = [shard(config(), rank, 6) for rank in range(6)]
    assert [part.query_groups for part in parts] == [(2,), (1,), (2,), (1,), (2,), (1,)]


@pytest.mark.parametrize(("tp", "reason"), [(0, "tp=0"), (30, "can't cut 20 columns")])
def test_a_number_of_ranks_that_does_not_work_is_refused(tp: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        shard(config(vocab_size=20), 0, tp)
