"""Outputs that follow a grammar, from a real worker whose model knows nothing: each token a byte,
drawn nearly at random."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.columns import generate
from tests.support.decode_worker import DecodeWorker, decode_worker, eventually

MODEL = "tiny"
ENDLESS = {"ignore_eos": True}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "bc"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "count", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def worker(
    tiny_home: Path, tiny_redis: str, request: pytest.FixtureRequest
) -> Iterator[DecodeWorker]:
    settings = {"tp": request.param, "batch_sizes": "1,4", "max_batch_size": 8}
    with decode_worker(tiny_home, tiny_redis, MODEL, **settings) as running:
        yield running


def constrained(
    worker: DecodeWorker, seed: int = 0, max_tokens: int = 200, **constraint: str
) -> pb.StartGeneration:
    sampling = {"temperature": 1.0, "seed": seed}
    return worker.request(
        [seed % 250 + 1, 2],
        max_tokens,
        sampling=sampling,
        constraint=pb.OutputConstraint(**constraint),
    )


def test_outputs_follow_their_schema_and_end_with_it(worker: DecodeWorker) -> None:
    starts = {
        f"{seed}": constrained(worker, seed, json_schema=json.dumps(SCHEMA)) for seed in range(8)
    }
    answers = generate(worker, starts)
    for answer in answers.values():
        assert answer.reason == pb.FINISH_REASON_STOP
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(answer.text))
    assert len({answer.text for answer in answers.values()}) > 4
    again = generate(worker, {"again": starts["3"]})["again"]
    assert again.token_ids == answers["3"].token_ids


def test_regexes_and_grammars(worker: DecodeWorker) -> None:
    lark = 'start: word ("-" word)*\nword: /[a-c]{2}/'
    starts = {
        "regex": constrained(worker, 1, regex="(ab|c){3,5}!"),
        "lark": constrained(worker, 2, max_tokens=40, lark=lark),
        "special": constrained(worker, 3, regex='é"\\\\{2}\n'),
    }
    answers = generate(worker, starts)
    assert re.fullmatch("(ab|c){3,5}!", answers["regex"].text)
    assert re.fullmatch("[a-c]{2}(-[a-c]{2})*(-[a-c]?)?", answers["lark"].text)
    assert answers["special"].text == 'é"\\\\\n'


def test_an_end_of_sequence_is_drawn_only_where_the_output_may_end(worker: DecodeWorker) -> None:
    """Also where the model, by its bias, would end at once, or is to go on past its end."""
    for number, options in enumerate(({}, ENDLESS)):
        start = constrained(worker, regex="a{3,9}")
        start.sampling.logit_bias[256] = 100.0
        start.stop.ignore_eos = bool(options)
        answer = generate(worker, {f"{number}": start})[f"{number}"]
        assert (answer.text, answer.reason) == ("aaa", pb.FINISH_REASON_STOP)
        assert answer.token_ids[-1] == 256
    start.stop.min_tokens = 5
    assert generate(worker, {"late": start})["late"].text == "a" * 5


def test_logprobs_are_of_what_is_allowed(worker: DecodeWorker) -> None:
    start = constrained(worker, regex="[ab]x")
    start.logprobs = 5
    first, second = generate(worker, {"a": start})["a"].logprobs
    assert {each.text for each in first.top} == {"a", "b"}
    assert [(each.text, each.logprob) for each in second.top] == [("x", 0.0)]


def test_streams_beside_it_are_as_if_alone(worker: DecodeWorker) -> None:
    plain = {f"p{i}": worker.request([i + 1, 3], 50, stop=ENDLESS) for i in range(4)}
    alone = {name: generate(worker, {name: start})[name] for name, start in plain.items()}
    start = constrained(worker, 5, json_schema=json.dumps(SCHEMA))
    expected = generate(worker, {"c": start})["c"]
    answers = generate(worker, {"c": start, **plain})
    assert answers["c"].token_ids == expected.token_ids
    for name, answer in alone.items():
        assert answers[name].token_ids == answer.token_ids


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"json_schema": '{"type": "array", "uniqueItems": true}'}, "uniqueItems"),
        ({"json_schema": "{"}, "not JSON"),
        ({"regex": "(a"}, "unclosed"),
        ({"regex": "|".join(map(str, range(1_000_000)))}, "bytes"),
        ({"regex": "((((a{100}){100}){100}){100}){100}"}, "regex"),
        ({"lark": 'start: "a" b'}, "unknown name"),
    ],
    ids=["keyword", "json", "regex", "million", "catastrophe", "lark"],
)
def test_what_can_not_be_held_to_is_refused(
    worker: DecodeWorker, constraint: dict[str, str], words: str
) -> None:
    beside = worker.request([1, 2], 20, stop=ENDLESS)
    alone = generate(worker, {"alone": beside})["alone"].token_ids
    answers = generate(worker, {"bad": constrained(worker, **constraint), "good": beside}, 10)
    error = answers["bad"].end.error
    assert error.code == pb.ERROR_CODE_INVALID_ARGUMENT
    assert words in error.message
    assert answers["good"].token_ids == alone


def test_a_killed_rank_costs_nothing_but_time(worker: DecodeWorker) -> None:
    starts = {f"{seed}": constrained(worker, seed, regex="[a-z]{150}") for seed in range(3)}
    expected = generate(worker, starts)
    client = worker.client()
    for name, start in starts.items():
        client.start(name, start)
    client.next("0")
    os.kill(worker.ranks()[0], signal.SIGKILL)
    for name, answer in expected.items():
        tokens = client.finish(name).token_ids
        assert tokens == answer.token_ids[-len(tokens) :]
        assert len(tokens) >= 149


def test_a_request_goes_on_behind_what_another_worker_made(worker: DecodeWorker) -> None:
    start = constrained(worker, 4, json_schema=json.dumps(SCHEMA))
    whole = generate(worker, {"whole": start})["whole"]
    for cut in (1, 10, len(whole.token_ids)):
        start.resumed_token_ids[:] = whole.token_ids[:cut]
        rest = generate(worker, {f"{cut}": start})[f"{cut}"]
        assert rest.token_ids == whole.token_ids[cut:]
        assert rest.reason == pb.FINISH_REASON_STOP
    start.resumed_token_ids[:] = [1]
    error = generate(worker, {"wrong": start})["wrong"].end.error
    assert (error.code, "resumed" in error.message) == (pb.ERROR_CODE_INVALID_ARGUMENT, True)


def test_an_abort_while_it_is_compiled(worker: DecodeWorker) -> None:
    client = worker.client()
    endless = "".join(f"([a-z]{{0,99}}{x})?" for x in "abcdefghij" * 400)
    client.start("a", constrained(worker, regex=endless))
    client.abort("a")
    assert client.finish("a").reason == pb.FINISH_REASON_ABORTED
    client.start("a", constrained(worker, regex="ab"))
    assert client.finish("a").text == "ab"
    eventually(lambda: worker.status().running + worker.status().waiting == 0)


def test_few_blocks_and_many_grammars(tiny_home: Path, tiny_redis: str) -> None:
    """Requests are preempted in the middle of their output, and computed again."""
    settings = {"batch_sizes": "1", "kv_blocks": 12, "block_size": 16, "max_batch_size": 6}
    with decode_worker(tiny_home, tiny_redis, MODEL, max_context_length=160, **settings) as worker:
        starts = {
            f"{seed}": constrained(worker, seed, regex=f"[a-f]{{{60 + seed}}}") for seed in range(6)
        }
        crowd = generate(worker, starts)
        for seed, (name, start) in enumerate(starts.items()):
            assert re.fullmatch(f"[a-f]{{{60 + seed}}}", crowd[name].text)
            alone = generate(worker, {name: start})[name]
            assert alone.token_ids == crowd[name].token_ids
