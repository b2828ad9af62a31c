"""Requests that outlive their ranks, or go on behind output that was made elsewhere: real ranks."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from precast.proto.decode.v1 import decode_service_pb2 as pb
from tests.support.decode_worker import DecodeClient, DecodeWorker, decode_worker, eventually
from tests.support.models import VOCABULARY

TOKENS = 120
SCHEMA = json.dumps(
    {
        "type": "array",
        "minItems": 30,
        "items": {
            "type": "object",
            "properties": {"a": {"type": "string"}, "b": {"enum": [1, None, "x"]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    }
)
PAIRS = [{"token_ids": [first, second]} for first in range(60) for second in range(0, 128, 2)]
"""Half of what may follow a token."""
KINDS: list[dict[str, Any]] = [
    {},
    {"sampling": {"temperature": 1.2, "seed": 5}, "logprobs": 2},
    {"sampling": {"temperature": 0.9, "seed": 6, "top_p": 0.8, "frequency_penalty": 0.7}},
    {"sampling": {"repetition_penalty": 1.3, "presence_penalty": 0.5}},
    {"sampling": {"temperature": 1.0, "seed": 7, "logit_bias": {40: 5.0}, "min_p": 0.02}},
    {"stop": {"stop_strings": ["zz", "~!"]}, "sampling": {"temperature": 1.5, "seed": 8}},
    {"deliver_at_end": True, "sampling": {"temperature": 1.0, "seed": 9}},
    {"stop": {"stop_token_ids": [77]}, "sampling": {"temperature": 2.0, "seed": 10}},
    {"constraint": {"regex": "([a-f]{3,9} )+[0-9]{9}"}, "sampling": {"temperature": 1, "seed": 11}},
    {"constraint": {"json_schema": SCHEMA}, "sampling": {"frequency_penalty": 0.4}},
    {"stop": {"min_tokens": 60, "stop_strings": ["e", "t"], "include_stop_string": True}},
    {"stop": {"show_special_tokens": True}, "logprobs": 0},
    {"sampling": {"banned_sequences": PAIRS}},
]


@pytest.fixture(scope="module")
def worker(tiny_home: Path, tiny_redis: str) -> Iterator[DecodeWorker]:
    settings = {"tp": 2, "batch_sizes": "1", "max_batch_size": 16}
    with decode_worker(tiny_home, tiny_redis, "tiny", **settings) as running:  # type: ignore[arg-type]
        yield running


@dataclass(kw_only=True)
class Heard:
    """What a client got of one request, delta by delta."""

    deltas: list[pb.TokenDelta] = field(default_factory=list)
    end: pb.GenerationFinished | None = None

    @property
    def ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def reports(self) -> list[bytes]:
        found = (report for delta in self.deltas for report in delta.logprobs)
        return [report.SerializeToString() for report in found]

    def whole(self) -> tuple[Any, ...]:
        assert self.end is not None
        usage = (self.end.reason, self.end.prompt_tokens, self.end.completion_tokens)
        return (self.ids, self.text, self.reports, *usage)


def listen(client: DecodeClient, name: str, enough: int | None = None) -> Heard:
    """Up to a request's end, or to so many tokens."""
    heard = Heard()
    while enough is None or len(heard.ids) < enough:
        response = client.next(name)
        if response.WhichOneof("event") != "delta":
            assert response.WhichOneof("event") == "finished", response
            heard.end = response.finished
            break
        heard.deltas.append(response.delta)
    return heard


def starts(worker: DecodeWorker) -> dict[str, pb.StartGeneration]:
    """16 requests, of each kind at least one."""
    found = {}
    for number in range(16):
        kind = dict(KINDS[number % len(KINDS)])
        stop = {"ignore_eos": True, **kind.pop("stop", {})}
        prompt = [(number * 13 + at * 7) % 255 + 1 for at in range(3 + 5 * number)]
        found[f"{number}"] = worker.request(prompt, TOKENS, stop=stop, **kind)
    return found


@pytest.fixture(scope="module")
def undisturbed(worker: DecodeWorker) -> dict[str, Heard]:
    client = worker.client()
    found = {}
    for name, start in starts(worker).items():
        client.start(name, start)
    for name in starts(worker):
        found[name] = listen(client, name)
    client.close()
    assert any(len(heard.ids) < TOKENS for heard in found.values()), "no stop condition was met"
    return found


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_ranks_lost_under_sixteen_streams_cost_them_nothing_but_time(
    worker: DecodeWorker, undisturbed: dict[str, Heard], signum: signal.Signals
) -> None:
    eventually(worker.is_ready)
    restarts = worker.status().restarts
    client = worker.client()
    for name, start in starts(worker).items():
        client.start(name, start)
    begun = listen(client, "0", enough=10)
    os.kill(worker.ranks()[signum == signal.SIGKILL], signum)
    heard = {name: listen(client, name) for name in undisturbed}
    heard["0"].deltas[:0] = begun.deltas
    eventually(lambda: worker.status().restarts == restarts + 1)
    for name, expected in undisturbed.items():
        assert heard[name].whole() == expected.whole(), name
    client.close()


def test_output_of_elsewhere_is_continued_exactly(
    worker: DecodeWorker, undisturbed: dict[str, Heard]
) -> None:
    """Wherever it is cut: what was sent before and what comes now are what one run gives."""
    eventually(worker.is_ready)
    client = worker.client()
    cut: dict[str, tuple[Heard, Heard]] = {}
    for name, start in starts(worker).items():
        expected = undisturbed[name]
        for share in (0.0, 0.3, 0.9):
            before = Heard(deltas=expected.deltas[: max(1, int(share * len(expected.deltas)))])
            if len(before.ids) >= len(expected.ids):  # came as one
                continue
            resumed = pb.StartGeneration()
            resumed.CopyFrom(start)
            resumed.resumed_token_ids.extend(before.ids)
            cut[f"{name}-{share}"] = before, expected
            client.start(f"{name}-{share}", resumed)
    assert len(cut) > 2 * len(undisturbed)
    for name, (before, expected) in cut.items():
        after = listen(client, name)
        after.deltas[:0] = before.deltas
        assert after.whole() == expected.whole(), name
    client.close()


def test_what_is_to_come_at_the_end_comes_with_an_abort(worker: DecodeWorker) -> None:
    """So that a drained worker's requests go on elsewhere from where they were."""
    eventually(worker.is_ready)
    client = worker.client()
    stop = {"ignore_eos": True}
    client.start("whole", worker.request([3, 4], 240, stop=stop))
    expected = listen(client, "whole")
    cut = next(
        found for attempt in range(50) if (found := cut_amid(worker, client, f"cut-{attempt}"))
    )
    client.start("rest", worker.request([3, 4], 240, stop=stop, resumed_token_ids=cut.ids))
    rest = listen(client, "rest")
    assert (cut.ids + rest.ids, cut.text + rest.text) == (expected.ids, expected.text)
    client.close()


def cut_amid(worker: DecodeWorker, client: DecodeClient, name: str) -> Heard | None:
    """What comes of a request that is aborted while it runs; None: it was not caught at that."""
    stop = {"ignore_eos": True}
    client.start(name, worker.request([3, 4], 240, stop=stop, deliver_at_end=True))
    time.sleep(random.uniform(0, 0.1))
    worker.stub().Abort(pb.AbortRequest(request_id=name), timeout=30)
    cut = listen(client, name)
    if not 0 < len(cut.ids) < 240:
        return None
    assert cut.end is not None
    assert cut.end.reason == pb.FINISH_REASON_ABORTED
    return cut


def test_a_constrained_request_that_leaves_in_a_step_costs_no_ranks(worker: DecodeWorker) -> None:
    """Its draws wait for masks then, and there are none."""
    eventually(worker.is_ready)
    restarts = worker.status().restarts
    client = worker.client()
    options = {"constraint": {"regex": "([a-f]{3,9} )+[0-9]{9}"}, "stop": {"ignore_eos": True}}
    for number in range(8):
        client.start(f"{number}", worker.request([number + 1], 200, **options))
        client.next(f"{number}")
        client.abort(f"{number}")
    eventually(lambda: worker.status().running == 0)
    client.start("last", worker.request([1], 5))
    listen(client, "last")
    assert worker.status().restarts == restarts
    client.close()


@pytest.mark.parametrize(
    ("resumed", "changes", "message"),
    [
        ([1, VOCABULARY], {}, f"token id {VOCABULARY}"),
        ([1] * 9, {"max_tokens": 9}, "9 tokens, but max_tokens = 9"),
        ([1] * 255, {"max_tokens": 300}, "have 257 tokens"),
        ([1, 256, 1], {}, "ends the output"),
        ([1, 77], {"stop": {"stop_token_ids": [77]}}, "ends the output"),
        ([65, 66, 67], {"stop": {"stop_strings": ["b"]}}, "stop string"),
        ([65, 66], {"constraint": {"regex": "[0-9]+"}}, "don't follow the constraint"),
    ],
)
def test_output_that_can_t_be_continued_is_refused_by_name(
    worker: DecodeWorker, resumed: list[int], changes: dict[str, Any], message: str
) -> None:
    eventually(worker.is_ready)
    client = worker.client()
    options = {"max_tokens": 20, "resumed_token_ids": resumed, **changes}
    start = worker.request([1, 2], **options)
    client.start("bad", start)
    end = client.finish("bad").end
    assert end.error.code == pb.ERROR_CODE_INVALID_ARGUMENT, end
    assert message in end.error.message
    client.close()
