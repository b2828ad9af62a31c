"""A real decode worker with real ranks on a tiny model: requests, limits, faults."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from queue import Queue

import grpc
import pytest
from safetensors.torch import load_file

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.rpc.server import COLUMNS, HEARTBEATS
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually
from tests.support.models import VOCABULARY, write_model
from tests.support.quantized_folders import quantize

MODEL = "tiny"


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def worker(
    tiny_home: Path, tiny_redis: str, request: pytest.FixtureRequest
) -> Iterator[DecodeWorker]:
    """Shared by tests that leave it running."""
    with decode_worker(
        tiny_home, tiny_redis, MODEL, tp=request.param, batch_sizes="1,4", max_waiting=6
    ) as running:
        yield running


ENDLESS = {"ignore_eos": True}


def test_greedy_is_the_same_alone_and_in_a_crowd(worker: DecodeWorker) -> None:
    client = worker.client()
    prompts = [[i, i + 1, i + 2] for i in range(5)]
    alone = []
    for index, prompt in enumerate(prompts):
        client.start(f"alone-{index}", worker.request(prompt, 20, stop=ENDLESS))
        alone.append(client.finish(f"alone-{index}").token_ids)
    for index, prompt in enumerate(prompts):
        client.start(f"crowd-{index}", worker.request(prompt, 20, stop=ENDLESS))
    assert [client.finish(f"crowd-{i}").token_ids for i in range(5)] == alone
    assert all(len(tokens) == 20 for tokens in alone)


def test_heartbeats_come_to_those_who_ask(worker: DecodeWorker) -> None:
    asked, silent = (
        worker.stub().Generate(iter(Queue().get, None), metadata=metadata, timeout=20)
        for metadata in ([HEARTBEATS], [])
    )
    began = time.monotonic()
    beats = [next(asked).heartbeat for _ in range(3)]
    assert 1.5 < time.monotonic() - began < 10
    assert {beat.state for beat in beats} == {pb.WORKER_STATE_READY}
    assert {beat.worker_id for beat in beats} == {worker.status().worker_id}
    asked.cancel()
    silent.cancel()
    with pytest.raises(grpc.RpcError):  # older gateways know no heartbeats
        next(silent)


def test_columns_come_to_those_who_ask(worker: DecodeWorker) -> None:
    """The same tokens and text as messages of single requests have; some only at the end."""
    prompts = {7: [1, 2], 8: [3, 4, 5], 9: [6, 7]}
    client = worker.client()
    expected = {}
    for handle, prompt in prompts.items():
        client.start(f"single-{handle}", worker.request(prompt, 20, logprobs=1, stop=ENDLESS))
        answer = client.finish(f"single-{handle}")
        expected[handle] = (answer.token_ids, answer.text)
    requests: Queue[pb.GenerateRequest] = Queue()
    for handle, prompt in prompts.items():
        late = {"deliver_at_end": True} if handle == 9 else {}
        start = worker.request(prompt, 20, logprobs=1, stop=ENDLESS, **late)
        requests.put(pb.GenerateRequest(request_id=f"column-{handle}", handle=handle, start=start))
    call = worker.stub().Generate(iter(requests.get, None), metadata=[COLUMNS], timeout=60)
    ids: dict[int, list[int]] = {handle: [] for handle in prompts}
    reports: dict[int, list[int]] = {handle: [] for handle in prompts}
    texts, pieces, ends = dict.fromkeys(prompts, ""), Counter[int](), dict[int, int]()
    while len(ends) < len(prompts):
        step = next(call).step
        rest = list(step.token_ids)
        for handle, count, text in zip(step.handles, step.token_counts, step.texts, strict=True):
            ids[handle] += rest[:count]
            rest = rest[count:]
            texts[handle] += text
            pieces[handle] += 1
        for each in step.logprobs:
            reports[each.handle] += [token.token_id for token in each.tokens]
        ends |= {end.handle: end.finished.completion_tokens for end in step.ends}
    call.cancel()
    assert {handle: (ids[handle], texts[handle]) for handle in prompts} == expected
    assert reports == ids
    assert ends == dict.fromkeys(prompts, 20)
    assert pieces[9] == 1 < min(pieces[7], pieces[8])


def test_cached_tokens_are_told_and_salts_share_nothing(worker: DecodeWorker) -> None:
    client = worker.client()
    prompt = [number % 200 + 1 for number in range(0, 400, 7)]  # no other test has it
    found = []
    for number, salt in enumerate(("x", "x", "y", "")):
        client.start(f"{number}", worker.request(prompt, 1, cache_salt=salt))
        found.append(client.finish(f"{number}").end.finished.cached_tokens)
    assert found == [0, 32, 0, 0]
    client.start("long", worker.request(prompt, 1, cache_salt="x" * 257))
    end = client.finish("long").end
    assert (end.error.code, "cache_salt" in end.error.message) == (
        pb.ERROR_CODE_INVALID_ARGUMENT,
        True,
    )


def test_a_seed_gives_the_same_tokens(worker: DecodeWorker) -> None:
    client = worker.client()
    outputs = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        sampling = {"temperature": 1.5, "seed": seed}
        client.start(name, worker.request([1, 2], 30, sampling=sampling, stop=ENDLESS))
        outputs.append(client.finish(name).token_ids)
    assert outputs[0] == outputs[1] != outputs[2]


def test_the_smallest_top_p_is_the_likeliest_token(worker: DecodeWorker) -> None:
    """1e-320 rounds to 0 on the wire, and is there nevertheless."""
    client = worker.client()
    client.start("greedy", worker.request([1, 2], 20, stop=ENDLESS))
    sampling = {"temperature": 2.0, "top_p": 1e-320}
    client.start("top_p", worker.request([1, 2], 20, sampling=sampling, stop=ENDLESS))
    client.start("top_k", worker.request([1, 2], 20, sampling={**sampling, "top_k": 1, "top_p": 1}))
    tokens = client.finish("greedy").token_ids
    assert client.finish("top_p").token_ids == tokens
    found = client.finish("top_k").token_ids
    assert found == tokens[: len(found)]


def test_a_bias_for_every_token_and_penalties_beside_other_streams(worker: DecodeWorker) -> None:
    client = worker.client()
    others = {str(index): worker.request([index], 30, stop=ENDLESS) for index in range(3)}
    alone = {}
    for name, request in others.items():
        client.start(f"alone-{name}", request)
        alone[name] = client.finish(f"alone-{name}").token_ids
    for name, request in others.items():
        client.start(name, request)
    bias = {token: 100.0 if token in (40, 41) else -100.0 for token in range(VOCABULARY)}
    sampling = {"logit_bias": bias, "temperature": 1.0, "seed": 3}
    client.start("biased", worker.request([9], 12, sampling=sampling, stop=ENDLESS))
    assert set(client.finish("biased").token_ids) <= {40, 41}
    assert {name: client.finish(name).token_ids for name in others} == alone
    # Each time that a token was said costs it 2, more than this model's logits differ by.
    sampling = {"frequency_penalty": 2.0, "repetition_penalty": 100.0}
    client.start("penalised", worker.request([9], 12, sampling=sampling, stop=ENDLESS))
    tokens = client.finish("penalised").token_ids
    assert len(set(tokens)) == 12


def test_tokens_are_allowed_or_banned_whatever_the_model_prefers(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("free", worker.request([9], 8, stop=ENDLESS))
    free = client.finish("free").token_ids
    banned = {"banned_token_ids": sorted(set(free))}
    client.start("banned", worker.request([9], 8, sampling=banned, stop=ENDLESS))
    assert not set(free) & set(client.finish("banned").token_ids)
    # no end either, which is none of them; what is biased is still not allowed
    allowed = {"allowed_token_ids": [40, 41], "logit_bias": {42: 100.0, 41: 50.0}}
    client.start("allowed", worker.request([9], 40, sampling=allowed))
    answer = client.finish("allowed")
    assert answer.token_ids == [41] * 40
    assert answer.end.finished.reason == pb.FINISH_REASON_LENGTH


def test_no_banned_sequence_turns_up_whatever_the_model_prefers(worker: DecodeWorker) -> None:
    """Whether the likeliest tokens are drawn or others, beside a stream that has none."""
    client = worker.client()
    client.start("free", worker.request([9], 40, stop=ENDLESS))
    free = client.finish("free").token_ids
    pairs = set(pairwise(free))
    banned = {"banned_sequences": [{"token_ids": pair} for pair in pairs]}
    warm = {**banned, "temperature": 1.0, "seed": 4}
    client.start("free", worker.request([9], 40, stop=ENDLESS))
    client.start("banned", worker.request([9], 40, sampling=banned, stop=ENDLESS))
    client.start("warm", worker.request([9], 40, sampling=warm, stop=ENDLESS))
    found = client.finish("banned").token_ids
    assert found[0] == free[0]  # the pairs may end, and do not
    for tokens in (found, client.finish("warm").token_ids):
        assert not pairs & set(pairwise(tokens))
    assert client.finish("free").token_ids == free


def test_logprobs_come_with_every_token(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("a", worker.request([1], 3, logprobs=2, stop=ENDLESS))
    entries = []
    while (response := client.next("a")).WhichOneof("event") == "delta":
        entries += response.delta.logprobs
    assert len(entries) == 3
    assert all(len(entry.top) == 2 and entry.top[0].logprob <= 0 for entry in entries)
    assert all(entry.token_id == entry.top[0].token_id for entry in entries)  # greedy


def test_a_stop_string_ends_the_request(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("whole", worker.request([5, 6], 30, stop=ENDLESS))
    text = client.finish("whole").text
    assert len(text) > 6
    cut = text[3:5]
    client.start("cut", worker.request([5, 6], 30, stop={**ENDLESS, "stop_strings": [cut]}))
    answer = client.finish("cut")
    assert answer.reason == pb.FINISH_REASON_STOP
    assert answer.text == text[: text.index(cut)]


def test_a_stop_token_ends_the_request(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("whole", worker.request([9], 10, stop=ENDLESS))
    tokens = client.finish("whole").token_ids
    client.start("cut", worker.request([9], 10, stop={**ENDLESS, "stop_token_ids": [tokens[2]]}))
    answer = client.finish("cut")
    assert answer.reason == pb.FINISH_REASON_STOP
    assert answer.token_ids == tokens[: tokens.index(tokens[2]) + 1]


def test_a_stop_string_can_be_kept_and_may_not_come_too_early(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("whole", worker.request([5, 6], 30, stop=ENDLESS))
    whole = client.finish("whole")
    cut = whole.text[3:5]
    rules = {**ENDLESS, "stop_strings": [cut]}
    client.start("kept", worker.request([5, 6], 30, stop={**rules, "include_stop_string": True}))
    kept = client.finish("kept")
    assert kept.reason == pb.FINISH_REASON_STOP
    assert kept.text == whole.text[: whole.text.index(cut) + len(cut)]
    texts = []
    for name, strings in (("late", [cut]), ("never", [])):
        stop = {**ENDLESS, "stop_strings": strings, "min_tokens": 30}
        client.start(name, worker.request([5, 6], 30, stop=stop))
        texts.append(client.finish(name).text)
    assert texts[0] == texts[1]
    assert cut in texts[0]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
def test_no_end_before_min_tokens(worker: DecodeWorker, sampling: dict[str, float]) -> None:
    """Every token but one is a stop token: the request can end as soon as it may."""
    client = worker.client()
    stop = {"stop_token_ids": [token for token in range(VOCABULARY) if token != 7]}
    for least in (0, 3):
        rules = {**stop, "min_tokens": least}
        client.start(f"{least}", worker.request([9], 40, sampling=sampling, stop=rules))
        tokens = client.finish(f"{least}").token_ids
        assert tokens[:least] == [7] * least
        assert len(tokens) > least


def test_special_tokens_are_shown_where_they_are_wanted(worker: DecodeWorker) -> None:
    client = worker.client()
    bias = {"logit_bias": {256: 100.0}}
    for shown in (False, True):
        stop = {**ENDLESS, "show_special_tokens": shown}
        client.start(f"{shown}", worker.request([9], 2, sampling=bias, stop=stop))
        assert client.finish(f"{shown}").text == "<eos><eos>" * shown


def test_a_long_prompt_in_chunks_reads_as_a_short_one(tiny_home: Path, tiny_redis: str) -> None:
    """Chunked prefill and preemption change nothing about the tokens."""
    prompt = [(i * 7) % VOCABULARY for i in range(90)]
    outputs = []
    for settings in (
        {"prefill_chunk": 256},
        {"prefill_chunk": 16, "kv_blocks": 10, "block_size": 16},
    ):
        with decode_worker(
            tiny_home,
            tiny_redis,
            MODEL,
            batch_sizes="1",
            max_batch_size=4,
            max_context_length=160,
            **settings,
        ) as worker:
            client = worker.client()
            for index in range(3):
                client.start(str(index), worker.request(prompt[index:], 40, stop=ENDLESS))
            outputs.append([client.finish(str(index)).token_ids for index in range(3)])
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"model": "other"}, pb.ERROR_CODE_MODEL_NOT_FOUND, "tiny"),
        ({"prompt_token_ids": []}, pb.ERROR_CODE_INVALID_ARGUMENT, "empty"),
        ({"prompt_token_ids": [VOCABULARY]}, pb.ERROR_CODE_INVALID_ARGUMENT, "vocabulary"),
        ({"prompt_token_ids": [1] * 256}, pb.ERROR_CODE_CONTEXT_LENGTH_EXCEEDED, "256"),
        ({"stop": pb.StopConditions()}, pb.ERROR_CODE_INVALID_ARGUMENT, "max_tokens"),
        ({"sampling": pb.SamplingParams(top_p=1.5)}, pb.ERROR_CODE_INVALID_ARGUMENT, "top_p"),
        (
            {"sampling": pb.SamplingParams(temperature=float("nan"))},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "temperature",
        ),
        (
            {"sampling": pb.SamplingParams(logit_bias={VOCABULARY + 5: 1.0})},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "logit_bias",
        ),
        (
            {"sampling": pb.SamplingParams(logit_bias={7: 101.0})},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "logit_bias of token 7",
        ),
        (
            {"sampling": pb.SamplingParams(logit_bias=dict.fromkeys(range(1 << 17), 1.0))},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "131072 entries",
        ),
        (
            {"sampling": pb.SamplingParams(allowed_token_ids=[VOCABULARY])},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "allowed_token_ids: token id",
        ),
        (
            {"sampling": pb.SamplingParams(allowed_token_ids=[7], banned_token_ids=[7])},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "no token is left",
        ),
        (
            {
                "sampling": pb.SamplingParams(
                    allowed_token_ids=[7], banned_sequences=[pb.TokenSequence(token_ids=[1, 7])]
                )
            },
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "no token is left",
        ),
        (
            {"sampling": pb.SamplingParams(banned_sequences=[pb.TokenSequence()])},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "banned_sequences: one is empty",
        ),
        (
            {
                "sampling": pb.SamplingParams(
                    banned_sequences=[pb.TokenSequence(token_ids=[1] * 9000)]
                )
            },
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "9000 tokens",
        ),
        ({"sampling": pb.SamplingParams(min_p=1.5)}, pb.ERROR_CODE_INVALID_ARGUMENT, "min_p"),
        (
            {"sampling": pb.SamplingParams(repetition_penalty=0.0)},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "repetition_penalty",
        ),
        ({"logprobs": 500}, pb.ERROR_CODE_INVALID_ARGUMENT, "logprobs"),
        (
            {"stop": pb.StopConditions(max_tokens=2, min_tokens=3)},
            pb.ERROR_CODE_INVALID_ARGUMENT,
            "min_tokens",
        ),
        ({"prompt_logprobs": 0}, pb.ERROR_CODE_INVALID_ARGUMENT, "columns"),
        ({"constraint": pb.OutputConstraint()}, pb.ERROR_CODE_INVALID_ARGUMENT, "constraint"),
    ],
)
def test_a_wrong_field_is_refused_by_name(
    worker: DecodeWorker, change: dict[str, object], code: int, message: str
) -> None:
    values: dict[str, object] = {
        "model": MODEL,
        "prompt_token_ids": [1],
        "stop": pb.StopConditions(max_tokens=2),
    }
    client = worker.client()
    client.start("bad", pb.StartGeneration(**{**values, **change}))  # type: ignore[arg-type]
    end = client.finish("bad", 10).end
    assert (end.error.code, message in end.error.message) == (code, True), end
    client.start("good", worker.request([1], 2))
    assert client.finish("good").end.WhichOneof("event") == "finished"


def test_a_full_queue_refuses_and_abort_frees(worker: DecodeWorker) -> None:
    client = worker.client()
    names = [f"r{i}" for i in range(14)]
    for name in names:
        client.start(name, worker.request([1], 250, stop=ENDLESS))
    refused = []
    for name in names:
        response = client.next(name)
        if response.WhichOneof("event") == "error":
            assert response.error.code == pb.ERROR_CODE_OVERLOADED
            refused.append(name)
            if len(refused) == 4:
                break
        else:
            client.abort(name)
    assert refused
    for name in names:
        client.abort(name)
    eventually(lambda: worker.status().running + worker.status().waiting == 0)
    status = worker.status()
    assert status.kv_blocks_free == status.kv_blocks_total


def test_a_broken_stream_frees_its_requests(worker: DecodeWorker) -> None:
    channel = grpc.insecure_channel(worker.address)
    stub = channel.stream_stream(
        "/precast.decode.v1.DecodeService/Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )
    start = worker.request([1], 250, stop=ENDLESS)

    def requests() -> Iterator[pb.GenerateRequest]:
        yield pb.GenerateRequest(request_id="lost", start=start)
        time.sleep(30)

    responses = stub(requests())
    next(iter(responses))
    channel.close()
    eventually(lambda: worker.status().running == 0, 10)


def test_a_killed_rank_costs_requests_nothing_but_time(worker: DecodeWorker) -> None:
    client = worker.client()
    options = {"sampling": {"temperature": 1.5, "seed": 7}, "stop": ENDLESS, "logprobs": 0}
    client.start("alone", worker.request([1], 250, **options))
    expected = client.finish("alone")
    for victim in (0, -1):
        eventually(worker.is_ready)
        restarts = worker.status().restarts
        for number in range(6):
            client.start(f"r{number}", worker.request([1], 250, **options))
        client.next("r0")  # the others wait, or have no token yet
        os.kill(worker.ranks()[victim], signal.SIGKILL)
        answers = [client.finish(f"r{number}") for number in range(6)]
        assert all(answer.reason == pb.FINISH_REASON_LENGTH for answer in answers)
        assert {tuple(answer.token_ids) for answer in answers[1:]} == {tuple(expected.token_ids)}
        assert worker.status().restarts == restarts + 1


def test_a_hung_rank_does_not_hang_a_drain(tiny_home: Path, tiny_redis: str) -> None:
    with decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1") as worker:
        client = worker.client()
        client.start("stuck", worker.request([1], 250, stop=ENDLESS))
        client.next("stuck")
        os.kill(worker.ranks()[0], signal.SIGSTOP)
        drained = worker.stub().Drain(pb.DrainRequest(deadline_s=1), timeout=30)
        assert drained.aborted == 1
        assert client.finish("stuck", 10).reason == pb.FINISH_REASON_ABORTED


def test_drain_lets_requests_finish_and_admits_no_more(tiny_home: Path, tiny_redis: str) -> None:
    with decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1") as worker:
        client = worker.client()
        client.start("running", worker.request([1], 60, stop=ENDLESS))
        client.next("running")
        drained = worker.stub().Drain(pb.DrainRequest(deadline_s=20), timeout=30)
        assert (drained.finished, drained.aborted) == (1, 0)
        assert client.finish("running").reason == pb.FINISH_REASON_LENGTH
        client.start("late", worker.request([1], 2))
        assert client.finish("late").end.error.code == pb.ERROR_CODE_OVERLOADED
        assert worker.status().state == pb.WORKER_STATE_DRAINING
        assert worker.stub().Undrain(pb.UndrainRequest(), timeout=30).was_drained
        assert worker.is_ready()
        client.start("again", worker.request([1], 2))
        assert client.finish("again").reason == pb.FINISH_REASON_LENGTH
        assert not worker.stub().Undrain(pb.UndrainRequest(), timeout=30).was_drained


def test_undrained_before_its_end_a_drain_aborts_nothing(worker: DecodeWorker) -> None:
    client = worker.client()
    client.start("running", worker.request([1], 250, stop=ENDLESS))
    client.next("running")
    drain = worker.stub().Drain.future(pb.DrainRequest(deadline_s=20), timeout=30)
    eventually(lambda: worker.status().state == pb.WORKER_STATE_DRAINING)
    worker.stub().Undrain(pb.UndrainRequest(), timeout=30)
    assert drain.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "taken back into service" in drain.details()
    assert client.finish("running").reason == pb.FINISH_REASON_LENGTH


def test_a_worker_that_stops_is_not_taken_back(tiny_home: Path, tiny_redis: str) -> None:
    with decode_worker(tiny_home, tiny_redis, MODEL, batch_sizes="1") as worker:
        client = worker.client()
        client.start("running", worker.request([1], 250, stop=ENDLESS))
        client.next("running")
        os.kill(worker.ranks()[0], signal.SIGSTOP)  # or it would be over too soon
        worker.process.send_signal(signal.SIGTERM)
        eventually(lambda: worker.status().state == pb.WORKER_STATE_DRAINING)
        with pytest.raises(grpc.RpcError) as refusal:
            worker.stub().Undrain(pb.UndrainRequest(), timeout=30)
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION


def test_ranks_die_with_a_killed_leader(tiny_home: Path, tiny_redis: str) -> None:
    with decode_worker(tiny_home, tiny_redis, MODEL, tp=2, batch_sizes="1") as worker:
        ranks = worker.ranks()
        assert len(ranks) == 2
        worker.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    ours = [p for p in Path("/dev/shm").glob("precast-*") if str(worker.process.pid) in p.name]
    assert ours == []


def test_redis_may_be_away(tiny_home: Path) -> None:
    with decode_worker(tiny_home, "redis://127.0.0.1:1/0", MODEL, batch_sizes="1") as worker:
        client = worker.client()
        client.start("a", worker.request([1], 3))
        assert client.finish("a").end.WhichOneof("event") == "finished"


def test_a_quantised_folder_is_served_in_its_own_format(tmp_path: Path, tiny_redis: str) -> None:
    folder = write_model(tmp_path / "models" / "own")
    quantize(folder, load_file(folder / "model.safetensors"), "w8a8")
    with decode_worker(
        tmp_path, tiny_redis, "own", quantization="auto", batch_sizes="1", prefill_buckets=""
    ) as worker:
        assert worker.status().quantization == "int8"
        client = worker.client()
        client.start("one", worker.request([1, 2, 3], 5, stop=ENDLESS))
        assert len(client.finish("one").token_ids) == 5
