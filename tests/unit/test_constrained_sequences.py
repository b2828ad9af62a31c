"""Sequences with a grammar in the scheduler's steps, and the masks of their draws."""

import asyncio
import threading

import numpy as np
import pytest

from services.decode_worker.constraints import masks as step_masks
from services.decode_worker.constraints.grammar import Grammar
from services.decode_worker.constraints.masks import masks_of
from services.decode_worker.constraints.matcher import Matcher
from services.decode_worker.engine.pace import Pace
from services.decode_worker.engine.scheduler import Scheduler
from services.decode_worker.engine.sequence import FinishReason, SamplingSpec, Sequence
from services.decode_worker.engine.step import ScheduledStep
from tests.support.constraints import vocabulary
from tests.support.models import _tokenizer

BYTES = _tokenizer()
VOCABULARY = vocabulary(BYTES, "<eos>")


def compiled(regex: str) -> Matcher:
    return VOCABULARY.compile(Grammar(kind="regex", text=regex))


def ids(text: str) -> list[int]:
    found: list[int] = BYTES.encode(text).ids
    return found


def ints(data: bytes) -> list[int]:
    values: list[int] = np.frombuffer(data, dtype=np.int32).tolist()
    return values


def sequence(name: str, prompt: list[int], regex: str = "", **options: object) -> Sequence:
    return Sequence(
        request_id=name,
        prompt=prompt,
        sampling=SamplingSpec(),
        max_tokens=20,
        stop_token_ids=frozenset({256}),
        matcher=compiled(regex) if regex else None,
        **options,  # type: ignore[arg-type]
    )


def scheduler(**options: object) -> Scheduler:
    values = {"blocks": 64, "block_size": 4, "max_batch_size": 4, "max_context_length": 64}
    pace = Pace(0.15)
    for tokens in (1, 2, 4, 8):
        pace.observe(tokens, 0, 0.01)
    more = {"max_waiting": 8, "prefill_chunk": 16, "pace": pace}
    return Scheduler(**{**values, **more, **options})  # type: ignore[arg-type]


def next_step(engine: Scheduler) -> ScheduledStep:
    step = engine.schedule(0)
    assert step is not None
    return step


def drawing(step: ScheduledStep) -> list[str]:
    """Whose each draw is."""
    pairs = zip(step.sequences, step.draws, strict=True)
    return [sequence.request_id for sequence, draws in pairs for _ in range(draws)]


def test_a_sequence_ends_when_nothing_can_follow() -> None:
    engine = scheduler()
    engine.add(sequence("a", [1, 2], "ab"))
    reasons = []
    for token in ids("ab"):
        step = next_step(engine)
        assert (ints(step.message.masked), step.message.greedy) == ([0], False)
        reasons += [outcome.finished for outcome in engine.apply(step, [token])]
    assert reasons == [None, FinishReason.STOP]
    assert (engine.running, engine.schedule(9)) == (0, None)


def test_a_step_that_was_sent_ahead_of_the_end_is_for_nothing() -> None:
    engine = scheduler()
    constrained = sequence("a", [1, 2], "a")
    engine.add(constrained)
    first, second = next_step(engine), next_step(engine)
    [outcome] = engine.apply(first, ids("a"))
    assert outcome.finished is FinishReason.STOP
    assert second.masked == (constrained,)
    assert not constrained.alive
    assert engine.apply(second, [7]) == []


def test_masked_draws_are_named_by_their_place() -> None:
    """Behind another's draft, which is several draws."""
    engine = scheduler(graph_sizes=lambda: (1, 2, 4, 8, 16), prefill_chunk=64)
    engine.add(sequence("drafted", ids("abcabcabcabc")))
    engine.add(sequence("plain", ids("xyz")))
    engine.add(sequence("constrained", ids("cbacbacbacba"), "[abc]+"))
    step = next_step(engine)
    assert [drawing(step)[place] for place in ints(step.message.masked)] == ["constrained"]
    engine.apply(step, ids("abc"))
    step = next_step(engine)
    assert drawing(step).count("drafted") > 1
    assert [drawing(step)[place] for place in ints(step.message.masked)] == ["constrained"]


def test_what_is_preempted_goes_on_where_its_grammar_is() -> None:
    engine = scheduler()
    engine.add(sequence("a", [1, 2], "abc"))
    engine.apply(next_step(engine), ids("a"))
    engine.lose_cache(None)
    tokens, finished = "bc", None
    for letter in tokens:
        [outcome] = engine.apply(next_step(engine), ids(letter))
        finished = outcome.finished
    assert finished is FinishReason.STOP


async def test_masks_are_in_the_matchers_order() -> None:
    first, second = compiled("a"), compiled("b")
    wrong = compiled("c")
    wrong.take(ids("d")[0])
    found = await masks_of([first, None, wrong, second, None])
    assert found.rows == (0, -1, -1, 1, -1)
    assert found.words.shape == (2, VOCABULARY.width)
    bits = np.unpackbits(found.words.view(np.uint8), axis=1, bitorder="little")
    assert [np.flatnonzero(row).tolist() for row in bits] == [ids("a"), ids("b")]
    assert (await masks_of([None])).rows == (-1,)


async def test_a_mask_that_fails_costs_its_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As the library's are."""

    def fail(_: object) -> None:
        raise Panic

    good, bad = compiled("a"), compiled("b")
    monkeypatch.setattr(bad, "fill", fail)
    assert (await masks_of([bad, good])).rows == (-1, 1)
    assert "Panic" in bad.error


async def test_a_mask_that_takes_too_long_costs_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_masks, "LIMIT_S", 0.2)
    quick, slow = compiled("a"), compiled("b")
    slow.taken_s = 1.0
    release = threading.Event()
    monkeypatch.setattr(slow, "fill", lambda _: release.wait(20))
    found = await asyncio.wait_for(masks_of([slow, quick]), 5)
    assert found.rows == (-1, 1)
    assert "took more than" in slow.error
    assert not slow.is_complete
    slow.take(ids("b")[0])  # what still works on it is left alone
    release.set()
    assert (await masks_of([slow, quick])).rows == (-1, 0)
