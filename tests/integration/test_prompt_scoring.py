"""Log-probabilities of prompts, as a client of a real worker gets them: transformers' values."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.columns import ColumnAnswer, generate
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.models import VOCABULARY

MODEL = "tiny"
CHUNK = 24
PROMPT = [(i * i + 3 * i) % VOCABULARY for i in range(100)]
TOP = 5


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def worker(
    tiny_home: Path, tiny_redis: str, request: pytest.FixtureRequest
) -> Iterator[DecodeWorker]:
    settings = {"tp": request.param, "batch_sizes": "1,4", "prefill_chunk": CHUNK}
    with decode_worker(tiny_home, tiny_redis, MODEL, **settings) as running:
        yield running


Reference = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def reference(tiny_home: Path) -> Reference:
    """Log-probabilities [T, V] of what follows each token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_home / "models" / MODEL, dtype=torch.float32)

    def logprobs(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].log_softmax(-1)

    return logprobs


def check(answer: ColumnAnswer, prompt: list[int], top: int, reference: Reference) -> None:
    first, *rest = answer.prompt
    assert [report.token_id for report in answer.prompt] == prompt
    assert (first.logprob, len(first.top)) == (0.0, 0)
    expected = reference(prompt)
    for position, report in enumerate(rest):
        row = expected[position]
        assert report.logprob == pytest.approx(float(row[report.token_id]), abs=1e-3)
        likeliest = row.topk(top) if top else row[:0].topk(0)
        scores = [each.logprob for each in report.top]
        assert scores == pytest.approx(likeliest.values.tolist(), abs=1e-3)
        for each in report.top:
            assert each.logprob == pytest.approx(float(row[each.token_id]), abs=1e-3)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_a_prompt_in_chunks_has_transformers_logprobs(
    worker: DecodeWorker, reference: Reference, max_tokens: int
) -> None:
    start = worker.request(PROMPT, max_tokens, prompt_logprobs=TOP, logprobs=0)
    answer = generate(worker, {"a": start})["a"]
    check(answer, PROMPT, TOP, reference)
    assert answer.pieces >= len(PROMPT) // CHUNK
    assert len(answer.token_ids) == len(answer.logprobs) == max_tokens
    assert answer.end.finished.completion_tokens == max_tokens
    assert (answer.text == "") == (max_tokens == 0)
    assert answer.reason == pb.FINISH_REASON_LENGTH


def test_what_is_cached_is_scored_all_the_same(worker: DecodeWorker, reference: Reference) -> None:
    """A prompt that was computed before, one that is being computed, and their own cache after."""
    prompt = [3, *PROMPT]
    plain = worker.request(prompt, 1)
    scored = worker.request(prompt, 0, prompt_logprobs=0)
    generate(worker, {"before": plain})
    answers = generate(worker, {"one": scored, "other": scored, "beside": plain, "fifth": scored})
    for name in ("one", "other", "fifth"):
        check(answers[name], prompt, 0, reference)
        assert answers[name].end.finished.cached_tokens == 0
    assert generate(worker, {"after": plain})["after"].end.finished.cached_tokens == 96


def test_scoring_beside_streams_changes_none(worker: DecodeWorker, reference: Reference) -> None:
    """Scored steps run without a graph, and others decode in them."""
    stream = worker.request([7], 60, stop={"ignore_eos": True})
    alone = generate(worker, {"alone": stream})["alone"].token_ids
    prompts = {f"p{i}": [i, *PROMPT] for i in range(3)}
    starts = {name: worker.request(ids, 2, prompt_logprobs=1) for name, ids in prompts.items()}
    answers = generate(worker, {"stream": stream, **starts})
    assert answers["stream"].token_ids == alone
    for name, prompt in prompts.items():
        check(answers[name], prompt, 1, reference)
        assert (
            answers[name].token_ids
            == generate(worker, {"x": worker.request(prompt, 2)})["x"].token_ids
        )


def test_a_prompt_of_one_token(worker: DecodeWorker) -> None:
    answer = generate(worker, {"a": worker.request([5], 0, prompt_logprobs=3)})["a"]
    assert [(report.token_id, report.logprob) for report in answer.prompt] == [(5, 0.0)]
    assert answer.token_ids == []


def test_bias_and_penalties_are_not_of_the_prompt(
    worker: DecodeWorker, reference: Reference
) -> None:
    sampling = {"logit_bias": {7: 50.0}, "repetition_penalty": 2.0, "temperature": 2.0}
    start = worker.request(PROMPT, 1, prompt_logprobs=1, sampling=sampling)
    check(generate(worker, {"a": start})["a"], PROMPT, 1, reference)


def test_a_killed_rank_scores_no_token_twice(worker: DecodeWorker, reference: Reference) -> None:
    import os
    import signal
    import threading

    prompt = [i % VOCABULARY for i in range(250)]
    restarts = worker.status().restarts
    rank = worker.ranks()[0]
    timer = threading.Timer(0.02, os.kill, [rank, signal.SIGKILL])
    starts = {f"{i}": worker.request([i, *prompt], 1, prompt_logprobs=2) for i in range(4)}
    timer.start()
    answers = generate(worker, starts)
    timer.join()
    for index in range(4):
        check(answers[f"{index}"], [index, *prompt], 2, reference)
    deadline = time.monotonic() + 20
    while worker.status().restarts == restarts:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_stream_without_columns_is_refused(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("a", worker.request([1, 2], 0, prompt_logprobs=1))
    error = client.finish("a").end.error
    assert (error.code, "columns" in error.message) == (pb.ERROR_CODE_INVALID_ARGUMENT, True)
    refused = generate(worker, {"b": worker.request([1, 2], 1, prompt_logprobs=21)})["b"]
    assert "prompt_logprobs = 21" in refused.end.error.message
