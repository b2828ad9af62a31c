"""Ranks that die come back to their KV cache: requests decode on, no prompt is computed again."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.decode_worker import DecodeClient, DecodeWorker, decode_worker, eventually
from tests.support.models import write_model

MODEL = "long"
WINDOWS = "windows"
"""All of its layers attend to a window, which is shorter than the answers."""
TOKENS = 300
PROMPTS = ([1, 2, 3], [number % 200 + 1 for number in range(70)], [9] * 40)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kv-memory")
    write_model(home / "models" / MODEL, max_position_embeddings=2048)
    write_model(
        home / "models" / WINDOWS,
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        sliding_window=100,
        max_position_embeddings=2048,
    )
    return home


def prompt_steps(worker: DecodeWorker) -> int:
    status = worker.status()
    return int(status.eager_prompt_steps + status.graph_prompt_steps)


def start(worker: DecodeWorker, client: DecodeClient, name: str, prompt: list[int]) -> None:
    options: dict[str, Any] = {"stop": {"ignore_eos": True}, "logprobs": 2}
    if name.startswith("seed"):
        options["sampling"] = {"temperature": 1.0, "seed": 4, "presence_penalty": 0.5}
    client.start(name, worker.request(prompt, TOKENS, **options))


def tokens_of(client: DecodeClient, name: str) -> list[tuple[int, float]]:
    """Ids and log-probabilities of a whole answer."""
    found = list[tuple[int, float]]()
    while (response := client.next(name)).WhichOneof("event") == "delta":
        found += [(one.token_id, one.logprob) for one in response.delta.logprobs]
    assert response.finished.reason == pb.FINISH_REASON_LENGTH, response
    return found


@pytest.mark.parametrize(("model", "tp", "kv_dtype"), [(MODEL, 1, "int8"), (WINDOWS, 2, "bf16")])
def test_requests_decode_on_when_a_rank_was_killed(
    home: Path, tiny_redis: str, model: str, tp: int, kv_dtype: str
) -> None:
    settings: dict[str, Any] = {"tp": tp, "kv_dtype": kv_dtype, "kv_blocks": 256}
    with decode_worker(home, tiny_redis, model, batch_sizes="1,4", **settings) as worker:
        client = worker.client()
        for name in ("seed", "greedy"):
            for number, prompt in enumerate(PROMPTS):
                start(worker, client, f"{name}-{number}", prompt)
            expected = [tokens_of(client, f"{name}-{number}") for number in range(len(PROMPTS))]
            for number, prompt in enumerate(PROMPTS):
                start(worker, client, f"{name}-again-{number}", prompt)
            begun = [client.next(f"{name}-again-{number}") for number in range(len(PROMPTS))]
            os.kill(worker.ranks()[-1], signal.SIGKILL)
            before = prompt_steps(worker)
            found = [tokens_of(client, f"{name}-again-{number}") for number in range(len(PROMPTS))]
            first = [[(r.token_id, r.logprob) for r in one.delta.logprobs] for one in begun]
            assert [a + b for a, b in zip(first, found, strict=True)] == expected
            assert prompt_steps(worker) == before
        eventually(lambda: worker.status().restarts == 2)
        client.close()


def test_what_was_cached_is_there_with_the_next_ranks(home: Path, tiny_redis: str) -> None:
    with decode_worker(home, tiny_redis, MODEL, batch_sizes="1", kv_blocks=256) as worker:
        client = worker.client()
        prompt = list(range(1, 101))
        answers = []
        for name in ("first", "second"):
            client.start(name, worker.request(prompt, 4, stop={"ignore_eos": True}))
            answers.append(client.finish(name))
            os.kill(worker.ranks()[0], signal.SIGKILL)
            eventually(lambda: worker.status().state != pb.WORKER_STATE_READY)
            eventually(worker.is_ready)
        assert [one.end.finished.cached_tokens for one in answers] == [0, 96]
        assert answers[0].token_ids == answers[1].token_ids
        client.close()
