"""Which hidden states become a prompt's vector: pure bookkeeping."""

from collections.abc import Sequence as Many

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.decode_worker.engine.pooled_parts import pooled_parts, take_sums
from services.decode_worker.engine.pooling import Pooling
from services.decode_worker.engine.sequence import SamplingSpec, Sequence
from services.decode_worker.engine.step import ScheduledStep
from services.decode_worker.ranks.protocol import Step
from tests.support.lossy_steps import small_scheduler, steps_over


def ints(data: bytes) -> list[int]:
    values: list[int] = np.frombuffer(data, dtype=np.int32).tolist()
    return values


def sums(step: ScheduledStep) -> bytes:
    """As if the hidden state of a token were its id and 1."""
    if not isinstance(step.message, Step) or step.message.pooled is None:
        return b""
    ids, pooled = ints(step.message.token_ids), step.message.pooled
    stretches = zip(ints(pooled.firsts), ints(pooled.counts), strict=True)
    rows = [(sum(ids[first : first + count]), count) for first, count in stretches]
    return np.array(rows, dtype=np.float64).tobytes()


def sequence(number: int, length: int, kind: str | None, most: int) -> Sequence:
    pooling = None
    if kind is not None:
        pooling = Pooling(tokens=length, last_only=kind == "last", dimensions=2, raw=True)
    return Sequence(
        request_id=str(number),
        prompt=list(range(1, length + 1)),  # they begin alike
        sampling=SamplingSpec(),
        max_tokens=most,
        stop_token_ids=frozenset(),
        pooling=pooling,
    )


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([None, "mean", "last"]), st.integers(1, 12)),
        min_size=1,
        max_size=6,
    ),
    blocks=st.integers(9, 30),
    chunk=st.integers(1, 12),
    ahead=st.booleans(),
    lost=st.sets(st.integers(1, 12), max_size=2),
)
def test_each_hidden_state_counts_once(
    prompts: list[tuple[int, str | None, int]],
    blocks: int,
    chunk: int,
    ahead: bool,
    lost: set[int],
) -> None:
    """Whatever is shared, preempted or lost with the ranks, and however chunks are cut."""
    engine = small_scheduler(blocks, chunk)
    sequences = [sequence(number, *prompt) for number, prompt in enumerate(prompts)]
    for one in sequences:
        engine.add(one)
    for done in steps_over(engine, ahead=ahead, lost=lost):
        assert list(take_sums(done.pooled, sums(done))) == []
    for one in sequences:
        assert (one.pooling is not None) == (vector(one.pooling) != [])
        if one.pooling is not None:
            n = len(one.prompt)
            mean = (n + 1) / 2
            assert vector(one.pooling) == pytest.approx([n if one.pooling.last_only else mean, 1])


def vector(pooling: Pooling | None) -> list[float]:
    return [] if pooling is None else np.frombuffer(pooling.vector(), dtype="<f4").tolist()


def pooled(values: Many[float], **options: bool) -> list[float]:
    pooling = Pooling(tokens=1, last_only=False, dimensions=2, raw=options.get("raw", False))
    assert pooling.vector() == b""
    pooling.take(0, 1, np.array(values, dtype=np.float64))
    return vector(pooling)


def test_a_vector_is_cut_and_then_has_length_one() -> None:
    assert pooled([3, 4, 100]) == pytest.approx([0.6, 0.8])
    assert pooled([3, 4, 100], raw=True) == [3, 4]
    assert pooled([0, 0, 1]) == [0, 0]


def test_what_is_no_number_is_told() -> None:
    engine = sequence(0, 3, "mean", 1)
    [part] = pooled_parts([engine], [3])
    broken = np.array([[1, np.nan]], dtype=np.float64).tobytes()
    assert list(take_sums([part], broken)) == [engine]
    assert vector(engine.pooling) == []
