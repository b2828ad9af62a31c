"""Graphs for any kind of step: prompts beside what decodes, and sizes that traffic asks for."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.compile_worker import WorkerProcess, compile_worker
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually

MODEL = "tiny"
BUCKET = 16
TOKENS = 24
PROMPTS = ([5, 9, 2], list(range(1, 1 + BUCKET)), list(range(20, 60)), [7] * 31)
"""Shorter than the bucket, as long, and of several chunks."""
SETTINGS = {"batch_sizes": "4", "prefill_chunk": BUCKET, "prefill_buckets": str(BUCKET)}

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def compiler(tiny_home: Path, tiny_redis: str) -> Iterator[WorkerProcess]:
    with compile_worker(tiny_home, tiny_redis) as running:
        yield running


def answers(worker: DecodeWorker) -> list[list[int]]:
    """One after the other, so that prompts run alone, then all at once: later prompts run beside
    what the first ones decode."""
    client = worker.client()
    outputs = []
    for round_ in range(2):
        names = [f"{round_}-{index}" for index in range(len(PROMPTS))]
        for name, prompt in zip(names, PROMPTS, strict=True):
            client.start(name, worker.request(prompt, TOKENS, stop={"ignore_eos": True}))
            if round_ == 0:
                outputs.append(client.finish(name).token_ids)
        if round_ == 1:
            outputs += [client.finish(name).token_ids for name in names]
    client.close()
    return outputs


def test_prompts_and_mixed_steps_replay_graphs(
    tiny_home: Path, tiny_redis: str, request: pytest.FixtureRequest
) -> None:
    with decode_worker(tiny_home, tiny_redis, MODEL, **SETTINGS) as worker:
        eager = answers(worker)
        status = worker.status()
        assert (status.graph_steps, status.graph_prompt_steps) == (0, 0)
        assert status.eager_prompt_steps > 0
    assert eager[: len(PROMPTS)] == eager[len(PROMPTS) :]
    compiler = request.getfixturevalue("compiler")
    assert compiler.address
    with decode_worker(
        tiny_home, tiny_redis, MODEL, **SETTINGS, wait_for_graphs=True, ready_s=300
    ) as worker:
        assert [graph.num_tokens for graph in worker.status().graphs] == [4, BUCKET]
        assert answers(worker) == eager
        status = worker.status()
        assert status.eager_steps == 0
        # alone, each whole chunk; at once, what the prefix cache lacks, in as few steps as it fits
        assert status.graph_prompt_steps > sum(len(p) // BUCKET for p in PROMPTS)
        assert status.eager_prompt_steps < status.graph_prompt_steps
        traffic = status.traffic
        replayed = sum(size.tokens * size.replays for size in traffic.sizes)
        assert traffic.live_tokens + traffic.padding_tokens == replayed
        assert traffic.live_tokens >= 2 * len(PROMPTS) * (TOKENS - 1)
        assert traffic.padding_tokens > 0
        repeats_itself(worker)
        drafts_change_no_token(worker)


def repeats_itself(worker: DecodeWorker) -> None:
    """What is drawn again and again is drafted: some steps give many tokens."""
    client, before = worker.client(), worker.status().graph_steps
    said = worker.request([5, 9], 60, sampling={"logit_bias": {7: 100}}, stop={"ignore_eos": True})
    client.start("again", said)
    assert client.finish("again").token_ids == [7] * 60
    client.close()
    assert worker.status().graph_steps - before < 30


def drafts_change_no_token(worker: DecodeWorker) -> None:
    """Drawn by chance from few tokens, so that some drafts are right: each is the one that a
    request gives which ends with it, and for which nothing can be drafted."""
    client = worker.client()
    sampling = {"temperature": 1.0, "seed": 3, "logit_bias": dict.fromkeys((5, 6, 7), 60)}
    options = {"sampling": sampling, "logprobs": 2, "stop": {"ignore_eos": True}}

    def said(name: str, count: int, resumed: list[int]) -> list[tuple[int, float]]:
        start = worker.request([5, 6, 7, 5, 6], count, resumed_token_ids=resumed, **options)
        client.start(name, start)
        found = list[tuple[int, float]]()
        while (response := client.next(name)).WhichOneof("event") == "delta":
            found += [(one.token_id, one.logprob) for one in response.delta.logprobs]
        assert response.WhichOneof("event") == "finished", response
        return found

    whole = said("whole", 40, [])
    ids = [token for token, _ in whole]
    one_by_one = [said(f"to {count}", count + 1, ids[:count]) for count in range(40)]
    assert [part[0] for part in one_by_one] == whole
    client.close()


def test_a_size_that_traffic_needs_is_captured_and_used(
    tiny_home: Path, tiny_redis: str, compiler: WorkerProcess
) -> None:
    """Three sequences at a time, where there are graphs of one and eight."""
    del compiler
    with decode_worker(
        tiny_home,
        tiny_redis,
        MODEL,
        batch_sizes="1,8",
        adapt_interval_s=0.2,
        no_speculate=True,
        wait_for_graphs=True,
        ready_s=300,
    ) as worker:
        client = worker.client()

        def three_answers() -> pb.Traffic:
            for name in "abc":
                client.start(name, worker.request([5, 9, 2], 60, stop={"ignore_eos": True}))
            for name in "abc":
                client.finish(name)
            return worker.status().traffic

        def added() -> bool:
            return {s.tokens: s.origin for s in three_answers().sizes}.get(
                3
            ) == pb.GRAPH_SIZE_ORIGIN_ADDED

        eventually(added, 60)
        eventually(lambda: 3 in [graph.num_tokens for graph in worker.status().graphs], 240)
        assert worker.is_ready()
        padding = worker.status().traffic.padding_tokens
        seen = three_answers()
        replays = {size.tokens: size.replays for size in seen.sizes}
        assert replays[3] >= 50
        assert seen.padding_tokens - padding < 50
        assert [size.tokens for size in seen.sizes] == [1, 3, 8]
        assert [graph.num_tokens for graph in worker.status().graphs] == [1, 3, 8]
        client.close()
