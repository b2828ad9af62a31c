"""``precast.sample`` against its definition in float64, and that a row's bits are its own."""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precast.ops import native
from precast.ops.draw_status import DrawStatus
from precast.ops.sampling import Drawings, sample
from tests.support import command
from tests.support.other_isa import output_with
from tests.support.sampling_reference import (
    Floats,
    Row,
    adjusted,
    columns,
    interval,
    kept,
    log_softmax,
    uniform,
)

SLACK = 2e-5
"""Of shares: weights are float32, and there are up to thousands of them."""
TOP = 20
Property = Callable[[Callable[..., None]], Callable[..., None]]


def examples(count: int) -> Property:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def threads() -> None:
    torch.manual_seed(0)
    native.start_threads((-1, -1))


def run(logits: Tensor, rows: list[Row]) -> Drawings:
    return sample(logits.clone(), columns(rows, logits.shape[1]), TOP)


def exact(row: Tensor) -> Floats:
    return row.numpy().astype(np.float64)


def make_logits(seed: int, rows: int, vocabulary: int, shape: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, vocabulary, generator=generator)
    if shape == "ties":
        return (x * 2).round()
    if shape == "masked":
        return torch.where(x < 0.5, -torch.inf, x * 3)
    return x * {"flat": 0.3, "plain": 3.0, "peaked": 30.0, "huge": 1e30}[shape]


shapes = st.sampled_from(["flat", "plain", "peaked", "ties", "masked", "huge"])
vocabularies = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 127, 300, 1000, 6401])
penalties = st.sampled_from([0.0, 0.0, -2.0, 0.5, 2.0, 1e6])


@st.composite
def row_of(draw: st.DrawFn, vocabulary: int) -> Row:
    tokens = st.integers(0, vocabulary - 1)
    return Row(
        temperature=draw(st.sampled_from([0.0, 1e-30, 0.01, 0.3, 1.0, 1.0, 2.0, 100.0])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.0, 1e-320, 0.05, 0.5, 0.9, 0.99, 0.9999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 1e-6, 0.05, 0.5, 1.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 7, 40, 500, 10_000])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.3, 1e30])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        seed=draw(st.sampled_from([0, 1, 12345, 2**63, 2**64 - 1])),
        step=draw(st.integers(0, 5000)),
        logprobs=draw(st.sampled_from([-1, 0, 1, 5, TOP])),
        seen=draw(st.dictionaries(tokens, st.integers(0, 9), max_size=12)),
        bias=draw(st.dictionaries(tokens, st.floats(-100, 100, width=32), max_size=12)),
        allowed=draw(st.none() | st.none() | st.frozensets(tokens, min_size=1, max_size=40)),
    )


def check_row(logits: Tensor, row: Row, drawn: Drawings, index: int) -> None:
    x = adjusted(exact(logits), row)
    status, token = DrawStatus(int(drawn.status[index])), int(drawn.tokens[index])
    if np.isposinf(x).any():  # a penalty of -2e36 on logits of 1e38
        assert (status, token) == (DrawStatus.NOT_FINITE, -1)
    elif np.isneginf(x).all():
        assert (status, token) == (DrawStatus.NOTHING_LEFT, -1)
    else:
        assert status == DrawStatus.DRAWN
        check_token(x, row, token)
        check_logprobs(x, row, drawn, index)


def check_token(x: Floats, row: Row, token: int) -> None:
    if row.temperature == 0:
        assert token == int(x.argmax())
        return
    must, may = kept(x, row, SLACK)
    assert token in may
    number = uniform(row.seed, row.step)
    # Tokens that roundings may keep or drop move the others' intervals by their share.
    alternatives = [interval(x, row, tokens | {token}, token) for tokens in (must, may)]
    low, high = min(a[0] for a in alternatives), max(a[1] for a in alternatives)
    assert low - 3 * SLACK <= number <= high + 3 * SLACK


def check_logprobs(x: Floats, row: Row, drawn: Drawings, index: int) -> None:
    ids = drawn.top_ids[index].tolist()
    if row.logprobs < 0:
        assert ids == [-1] * TOP
        return
    scores = log_softmax(x)
    order = np.lexsort((np.arange(len(x)), -x))[: row.logprobs]
    order = order[x[order] > -np.inf]
    assert ids == order.tolist() + [-1] * (TOP - len(order))
    expected = torch.from_numpy(scores[order]).float()
    torch.testing.assert_close(
        drawn.top_logprobs[index, : len(order)], expected, rtol=2e-6, atol=2e-5
    )
    chosen = float(scores[int(drawn.tokens[index])])
    assert float(drawn.logprobs[index]) == pytest.approx(chosen, rel=2e-6, abs=2e-5)


@examples(300)
@given(st.data(), st.integers(0, 2**31), vocabularies, st.integers(1, 4), shapes)
def test_every_combination(
    data: st.DataObject, seed: int, vocabulary: int, count: int, shape: str
) -> None:
    logits = make_logits(seed, count, vocabulary, shape)
    rows = [data.draw(row_of(vocabulary)) for _ in range(count)]
    drawn = run(logits, rows)
    for index, row in enumerate(rows):
        check_row(logits[index], row, drawn, index)


def bits(drawn: Drawings, index: int) -> list[bytes]:
    fields = (getattr(drawn, field.name) for field in dataclasses.fields(drawn))
    return [field[index].numpy().tobytes() for field in fields]


@examples(40)
@given(st.data(), st.integers(0, 2**31), st.integers(1, 33), shapes)
def test_a_row_alone_gives_the_same_bits(
    data: st.DataObject, seed: int, count: int, shape: str
) -> None:
    vocabulary = data.draw(vocabularies)
    logits = make_logits(seed, count, vocabulary, shape)
    rows = [data.draw(row_of(vocabulary)) for _ in range(min(count, 5))]
    rows = [rows[index % len(rows)] for index in range(count)]
    together = run(logits, rows)
    for index in {0, count // 2, count - 1}:
        alone = run(logits[index : index + 1], [rows[index]])
        assert bits(alone, 0) == bits(together, index)


def random_row(random: Random, vocabulary: int) -> Row:
    tokens = [random.randrange(vocabulary) for _ in range(40)]
    return Row(
        temperature=random.choice([0.0, 0.3, 1.0, 1.7, 50.0]),
        top_p=random.choice([1.0, 1.0, 0.5, 0.9, 0.99]),
        top_k=random.choice([0, 0, 1, 40, 3000]),
        min_p=random.choice([0.0, 0.0, 0.01]),
        repetition_penalty=random.choice([1.0, 1.3]),
        frequency_penalty=random.choice([0.0, 0.7]),
        seed=random.getrandbits(64),
        logprobs=random.choice([-1, 0, TOP]),
        seen={token: random.randrange(5) for token in tokens},
        bias={token: random.uniform(-5, 5) for token in tokens[:20]},
        allowed=random.choice([None, None, frozenset(tokens)]),
    )


def batch_digest() -> str:
    """Of what a fixed set of batches gives."""
    random, digest = Random(5), hashlib.sha256()
    for vocabulary in (50, 1003, 20_011):
        for shape in ("flat", "plain", "peaked", "ties", "masked"):
            logits = make_logits(vocabulary, 17, vocabulary, shape)
            drawn = run(logits, [random_row(random, vocabulary) for _ in range(17)])
            for index in range(17):
                digest.update(b"".join(bits(drawn, index)))
    return digest.hexdigest()


def test_any_number_of_threads_gives_the_same_bits() -> None:
    digests = set()
    for threads in (1, 2, 3, 5):
        native.start_threads((-1,) * threads)
        digests.add(batch_digest())
    assert len(digests) == 1


def test_instruction_sets_give_the_same_bits() -> None:
    if os.environ.get("PRECAST_NATIVE_ISA"):
        pytest.skip("is the inner run")
    program = (
        "from tests.unit.test_sampling_operator import batch_digest, native;"
        "native.start_threads((-1, -1)); print(native.native_isa(), batch_digest())"
    )
    seen = {native.native_isa(): batch_digest()}
    for isa in ("scalar", "avx2"):
        name, digest = output_with(isa, "-c", program).split()
        assert name == isa
        seen[isa] = digest
    assert len(set(seen.values())) == 1, seen


@pytest.mark.parametrize("shape", ["flat", "plain", "peaked", "ties"])
def test_frequencies_follow_the_distribution(shape: str) -> None:
    logits = make_logits(3, 1, 40, shape)
    row = Row(temperature=0.9, top_p=0.95, min_p=0.001)
    rows = [dataclasses.replace(row, seed=seed) for seed in range(6000)]
    drawn = run(logits.expand(len(rows), -1), rows)
    tokens, _ = kept(exact(logits[0]), row, 0)
    ids = sorted(tokens)
    shares = np.exp((exact(logits[0])[ids] - float(logits.max())) / row.temperature)
    expected = np.zeros(40)
    expected[ids] = shares / shares.sum()
    counts = np.bincount(drawn.tokens.numpy(), minlength=40) / len(rows)
    assert np.abs(counts - expected).max() < 0.03
    assert counts[expected == 0].sum() == 0


def test_draws_are_philox() -> None:
    """The number itself: of 2^k equal tokens, the drawn one is its leading bits."""
    for seed, step in ((0, 0), (1, 0), (2**64 - 1, 3), (99, 2**40)):
        drawn = run(torch.zeros(1, 1 << 16), [Row(seed=seed, step=step)])
        assert int(drawn.tokens[0]) == int(uniform(seed, step) * (1 << 16))


@pytest.mark.parametrize(
    ("cut", "count"),
    [({"top_p": 0.9005}, 901), ({"top_k": 37}, 37), ({"top_k": 700, "top_p": 0.5001}, 351)],
)
def test_cuts_are_exact_to_the_token(cut: dict[str, Any], count: int) -> None:
    """Of 1000 equal tokens the first ``count`` are kept, each with the same share."""
    rows = [Row(seed=seed, **cut) for seed in range(300)]
    drawn = run(torch.zeros(len(rows), 1000), rows)
    expected = [int(uniform(seed, 0) * count) for seed in range(300)]
    assert drawn.tokens.tolist() == expected


@pytest.mark.parametrize("top_p", [0.0, 1e-320, 1e-30])
def test_the_smallest_top_p_is_the_likeliest_token(top_p: float) -> None:
    logits = make_logits(1, 1, 5000, "plain")
    rows = [Row(top_p=top_p, temperature=2.0, seed=seed) for seed in range(50)]
    drawn = run(logits.expand(len(rows), -1), rows)
    assert set(drawn.tokens.tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize("damage", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 70, 999])
def test_a_damaged_row_is_an_error_and_its_neighbours_are_not(damage: float, place: int) -> None:
    logits = make_logits(2, 5, 1000, "plain")
    logits[2, place] = damage
    kinds = [Row(temperature=0.0), Row(), Row(top_p=0.9), Row(top_k=5, logprobs=5), Row(min_p=0.1)]
    for shift in range(len(kinds)):
        rows = kinds[shift:] + kinds[:shift]
        drawn = run(logits, rows)
        assert drawn.status.tolist() == [0, 0, DrawStatus.NOT_FINITE, 0, 0]
        assert (drawn.tokens < 0).tolist() == [False, False, True, False, False]


def test_a_mask_does_not_hide_damage() -> None:
    logits = torch.zeros(1, 40)
    logits[0, 7] = torch.nan
    drawn = run(logits, [Row(allowed=frozenset({3}))])
    assert DrawStatus(int(drawn.status[0])) == DrawStatus.NOT_FINITE


@pytest.mark.parametrize("row", [Row(temperature=0.0), Row(), Row(top_p=0.5), Row(top_k=3)])
def test_nothing_left_is_an_error(row: Row) -> None:
    logits = torch.full((1, 100), -torch.inf)
    drawn = run(logits, [row])
    assert DrawStatus(int(drawn.status[0])) == DrawStatus.NOTHING_LEFT
    forbidden = dataclasses.replace(row, allowed=frozenset())
    drawn = run(torch.zeros(1, 100), [forbidden])
    assert DrawStatus(int(drawn.status[0])) == DrawStatus.NOTHING_LEFT


@pytest.mark.parametrize("token", [-1, 100, 2**31 - 1])
@pytest.mark.parametrize("kind", ["seen", "bias"])
def test_a_token_outside_of_the_vocabulary_is_that_rows_error(kind: str, token: int) -> None:
    bad = Row(**{kind: {token: 1}})  # type: ignore[arg-type]
    drawn = run(torch.zeros(2, 100), [bad, Row()])
    assert drawn.status.tolist() == [DrawStatus.BAD_TOKEN, DrawStatus.DRAWN]


def test_every_token_biased() -> None:
    """As many entries as the vocabulary has, beside rows without any."""
    logits = make_logits(4, 3, 49_152, "plain")
    wanted = 40_000
    bias = {token: -100.0 for token in range(49_152) if token != wanted}
    drawn = run(logits, [Row(), Row(bias=bias), Row()])
    assert int(drawn.tokens[1]) == wanted


def test_a_given_token_is_reported_on() -> None:
    logits = make_logits(6, 2, 300, "plain")
    drawn = run(logits, [Row(given=17, logprobs=2, temperature=0.0), Row(given=300)])
    assert drawn.tokens.tolist() == [17, -1]
    assert float(drawn.logprobs[0]) == pytest.approx(float(logits[0].log_softmax(-1)[17]), abs=1e-5)
    assert drawn.status.tolist() == [DrawStatus.DRAWN, DrawStatus.BAD_TOKEN]


def test_logits_may_be_part_of_a_wider_tensor() -> None:
    wide = torch.randn(3, 200)
    row = [Row(temperature=0.0)] * 3
    drawn = sample(wide[:, :150], columns(row, 150))
    assert drawn.tokens.tolist() == wide[:, :150].argmax(dim=1).tolist()
    assert run(torch.empty(0, 10), []).tokens.shape == (0,)


def test_what_the_operator_refuses() -> None:
    good = columns([Row()], 64)
    logits = torch.zeros(1, 64)
    bad = [
        (torch.zeros(1, 64, dtype=torch.float64), good, "float32"),
        (torch.zeros(2, 64), good, "reals must be float64"),
        (logits, columns([Row(temperature=-1.0)], 64), "temperature"),
        (logits, columns([Row(repetition_penalty=0.0)], 64), "repetition above 0"),
        (logits, columns([Row(allowed=frozenset({1}))], 32), "masks must be int32"),
    ]
    for given_logits, given_columns, message in bad:
        with pytest.raises(RuntimeError, match=message):
            sample(given_logits, given_columns)


def test_largest_says_where_logits_are_damaged() -> None:
    logits = make_logits(8, 4, 1000, "ties")
    logits[1, 999] = torch.nan
    logits[2] = -torch.inf
    values, places = torch.ops.precast.largest(logits)
    assert values[1].isnan()
    assert places[[0, 3]].tolist() == logits[[0, 3]].argmax(dim=1).tolist()
    assert (float(values[2]), int(places[2])) == (-torch.inf, 0)


def test_it_traces() -> None:
    """Schema, mutation and fake hold what they promise."""
    made = columns([Row(logprobs=2), Row(top_p=0.5)], 70)
    assert made.seen is not None
    assert made.bias is not None
    entries = (made.seen.starts, made.seen.ids, made.seen.values)
    biases = (made.bias.starts, made.bias.ids, made.bias.values)
    arguments = (torch.randn(2, 70), made.reals, made.ints, *entries, *biases, None, None, 2)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.precast.sample, arguments, test_utils=tests)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_parts_of_the_vocabulary_draw_what_one_draws(ranks: int) -> None:
    """None of them has the others' logits."""
    done = command.run(
        "tests.support.split_sampling_program:main", f"--ranks={ranks}", "--batches=80"
    )
    assert done.returncode == 0, done.stderr[-2000:]
