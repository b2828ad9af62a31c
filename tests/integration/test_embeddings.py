"""``/v1/embeddings`` of real workers: transformers' hidden states, whatever runs beside them."""

import base64
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread, Timer
from typing import Any

import numpy as np
import openai
import pytest
import torch

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.columns import generate
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.gateway_stack import Stack, eventually
from tests.support.models import HIDDEN, VOCABULARY

MODEL = "tiny"
CHUNK = 24
PROMPT = [(i * i + 3 * i) % (VOCABULARY - 4) for i in range(100)]
MEAN = pb.Embedding(pooling=pb.POOLING_MEAN)
Vector = Sequence[float]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def worker(
    tiny_home: Path, tiny_redis: str, request: pytest.FixtureRequest
) -> Iterator[DecodeWorker]:
    settings = {"tp": request.param, "batch_sizes": "1,4", "prefill_chunk": CHUNK}
    with decode_worker(tiny_home, tiny_redis, MODEL, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(worker: DecodeWorker, tiny_home: Path, tiny_redis: str) -> Iterator[openai.OpenAI]:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        with stack.gateway().client() as client:
            yield client
    finally:
        for process in stack.started:
            process.kill()
            process.wait()


Reference = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def reference(tiny_home: Path) -> Reference:
    """Hidden states [T, H] behind the last norm."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_home / "models" / MODEL, dtype=torch.float32)

    def hidden(ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([ids])).last_hidden_state[0]

    return hidden


def unit(vector: torch.Tensor) -> list[float]:
    values: list[float] = (vector / vector.norm()).tolist()
    return values


def embed(client: openai.OpenAI, given: object, **options: object) -> list[Vector]:
    answer = client.embeddings.create(
        model=MODEL,
        input=given,  # type: ignore[arg-type]
        extra_body=options,
    )
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return [one.embedding for one in answer.data]


def test_inputs_of_any_form_have_transformers_hidden_states(
    client: openai.OpenAI, reference: Reference
) -> None:
    """Longer than a chunk, and shorter; the prompts of one request are computed together."""
    others = [PROMPT[:1], PROMPT[:24], PROMPT[3:]]
    for ids, vector in zip([PROMPT, *others], embed(client, [PROMPT, *others]), strict=True):
        assert vector == pytest.approx(unit(reference(ids).mean(0)), abs=1e-3)
    assert embed(client, PROMPT) == embed(client, [PROMPT])
    assert embed(client, "abc") == embed(client, ["abc"])
    assert len(embed(client, ["abc", "b"])) == 2


def test_the_last_token_and_the_vectors_length(client: openai.OpenAI, reference: Reference) -> None:
    hidden = reference(PROMPT)
    [last] = embed(client, PROMPT, pooling="last")
    assert last == pytest.approx(unit(hidden[-1]), abs=1e-3)
    [short] = embed(client, PROMPT, dimensions=5)
    assert short == pytest.approx(unit(hidden.mean(0)[:5]), abs=1e-3)
    [raw] = embed(client, PROMPT, normalize=False)
    assert raw == pytest.approx(hidden.mean(0).tolist(), abs=1e-3)
    [cut] = embed(client, PROMPT, truncate_prompt_tokens=7)
    assert cut == pytest.approx(unit(reference(PROMPT[-7:]).mean(0)), abs=1e-3)


def test_numbers_and_base64_are_the_same(client: openai.OpenAI) -> None:
    raw = client.embeddings.with_raw_response
    written = raw.create(model=MODEL, input=PROMPT, encoding_format="float").http_response.json()
    packed = raw.create(model=MODEL, input=PROMPT, encoding_format="base64").http_response.json()
    data = base64.b64decode(packed["data"][0]["embedding"])
    assert np.frombuffer(data, dtype="<f4").tolist() == written["data"][0]["embedding"]
    assert written["usage"] == {"prompt_tokens": len(PROMPT), "total_tokens": len(PROMPT)}
    assert packed["model"] == MODEL


def test_a_prompt_may_fill_the_context(client: openai.OpenAI, reference: Reference) -> None:
    prompt = [5, *PROMPT, *PROMPT, *PROMPT[:55]]
    [vector] = embed(client, prompt, pooling="last")
    assert vector == pytest.approx(unit(reference(prompt)[-1]), abs=1e-3)
    scored: Any = {"model": MODEL, "prompt": prompt, "echo": True, "logprobs": 0}
    [choice] = client.completions.create(**scored, max_tokens=0).choices
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or ()) == len(prompt) == 256
    with pytest.raises(openai.BadRequestError, match="257 tokens"):
        client.completions.create(**scored, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="257 tokens"):
        embed(client, [*prompt, 1])


def test_more_dimensions_than_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        embed(client, PROMPT, dimensions=HIDDEN + 1)
    assert refused.value.param == "dimensions"
    assert str(HIDDEN) in refused.value.message


def test_the_cache_is_neither_trusted_nor_spoilt(
    worker: DecodeWorker, client: openai.OpenAI, reference: Reference
) -> None:
    """A mean needs hidden states that the cache hasn't got; what it then holds is good for all."""
    prompt = [3, *PROMPT]
    plain = worker.request(prompt, 4)
    before = generate(worker, {"before": plain})["before"]
    for pooling, expected in (("mean", reference(prompt).mean(0)), ("last", reference(prompt)[-1])):
        [vector] = embed(client, prompt, pooling=pooling)
        assert vector == pytest.approx(unit(expected), abs=1e-3)
    fresh = [4, *PROMPT]
    embed(client, fresh)
    after = generate(worker, {"a": plain, "b": worker.request(fresh, 4)})
    assert after["a"].token_ids == before.token_ids
    assert after["b"].end.finished.cached_tokens == 96
    salted = generate(worker, {"b": worker.request(fresh, 4, cache_salt="x")})["b"]
    assert after["b"].token_ids == salted.token_ids


def test_streams_beside_them_and_their_own_batch_change_nothing(
    worker: DecodeWorker, client: openai.OpenAI
) -> None:
    stream = worker.request([7], 80, stop={"ignore_eos": True})
    alone = generate(worker, {"alone": stream})["alone"].token_ids
    prompts = [[i, *PROMPT] for i in range(6)]
    quiet = [embed(client, prompt)[0] for prompt in prompts]
    busy: list[Vector] = []
    asking = Thread(target=lambda: busy.extend(embed(client, prompts)))
    asking.start()
    beside = generate(worker, {"beside": stream})["beside"].token_ids
    asking.join(timeout=30)
    assert beside == alone
    assert busy == quiet


def test_a_killed_rank_changes_no_vector(worker: DecodeWorker, reference: Reference) -> None:
    prompts = [[i, *PROMPT, *PROMPT] for i in range(6)]
    starts = {
        str(index): worker.request(prompt, 0, embed=MEAN) for index, prompt in enumerate(prompts)
    }
    restarts = worker.status().restarts
    timer = Timer(0.02, os.kill, [worker.ranks()[0], signal.SIGKILL])
    timer.start()
    answers = generate(worker, starts)
    timer.join()
    eventually(lambda: worker.status().restarts > restarts)
    for index, prompt in enumerate(prompts):
        vector = np.frombuffer(answers[str(index)].end.finished.embedding, dtype="<f4")
        assert vector.tolist() == pytest.approx(unit(reference(prompt).mean(0)), abs=1e-3)


def test_a_worker_refuses_what_it_does_not_know(worker: DecodeWorker) -> None:
    refused = generate(worker, {"a": worker.request([1], 0, embed=pb.Embedding(pooling=7))})["a"]
    assert refused.end.error.code == pb.ERROR_CODE_INVALID_ARGUMENT
    none = generate(worker, {"a": worker.request([1], 0)})["a"]
    assert "max_tokens" in none.end.error.message
