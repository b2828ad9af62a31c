"""How a model is cut over ranks."""

import pytest

from precast.errors import ConfigError
from precast.models.config import ModelConfig, RopeConfig
from precast.models.sharding import shard


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
        num_layers=30,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        max_position_embeddings=8192,
        eos_token_ids=(2,),
        **sizes,
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 5, 8])
def test_every_head_column_and_row_is_on_exactly_one_rank(kv_heads: int) -> None:
    model = config(kv_heads, vocab_size=50257, intermediate_size=1500)
    for tp in range(1, kv_heads + 1):
        shards = [shard(model, rank, tp) for rank in range(tp)]
        for name, total in (
            ("kv_heads", kv_heads),
            ("q_heads", model.q_heads),
            ("mlp", 1500),
            ("vocab", 50257),
        ):
            ranges = [getattr(s, name) for s in shards]
            assert [i for r in ranges for i in r] == list(range(total)), name
            assert all(len(r) > 0 for r in ranges), name
        assert all(s.vocab_widths == tuple(len(t.vocab) for t in shards) for s in shards)


def test_query_heads_follow_their_kv_heads() -> None:
    first, second = (shard(config(), rank, 2) for rank in range(2))
    assert (first.kv_heads, first.q_heads) == (range(2), range(6))
    assert (second.kv_heads, second.q_heads) == (range(2, 3), range(6, 9))


def test_the_mlp_evens_out_uneven_heads() -> None:
    model = config()
    work = []
    for rank in range(2):
        part = shard(model, rank, 2)
        attention = 576 * 64 * (2 * len(part.q_heads) + 2 * len(part.kv_heads))
        work.append(attention + 3 * 576 * len(part.mlp))
    assert max(work) / min(work) < 1.02


@pytest.mark.parametrize("tp", [0, 4])
def test_a_number_of_ranks_that_heads_do_not_allow_is_refused(tp: int) -> None:
    with pytest.raises(ConfigError, match=f"tp={tp}"):
        shard(config(), 0, tp)
