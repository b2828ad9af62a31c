"""The same bits whatever runs beside a request: a real decode worker on the demo model, many ways.

    python -m bench same_bits [--home PATH] [--precisions q4_1:bf16,int8:bf16,...] [--prompts 200]

For each precision (weights : KV cache) every prompt is answered alone by a worker that runs each
step eagerly, whole prompts at once, without drafts or a prefix cache. Then workers with other
chunks of prompts, with graphs, and with drafts answer all of them in batches of 2 to 32, beside the
prefill of longer prompts, and again with their beginnings in the cache. Tokens, and the
log-probabilities of the 20 likeliest at each place, have to be the very same floats. A share of the
answers is drawn by chance, some with penalties. Prints a row for each trial; the exit code says
whether all were alike.
"""

import argparse
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench._workers import AS_SERVED, MODEL, capture, home_folder
from bench.figures import record
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.redis_server import start_redis
from tests.support.decode_worker import DecodeClient, DecodeWorker, decode_worker

PRECISIONS: Final = "q4_1:bf16,int8:bf16,none:fp32,q4_1:int8"
BATCHES: Final = (2, 3, 5, 8, 13, 16, 24, 32)
TOKENS: Final = 12
TOP: Final = 20
COMMON: Final = 96
"""Tokens that a third of the prompts begin with."""
LONGER: Final = 400
ANSWER_S: Final = 300.0
EAGER: Final[Mapping[str, Any]] = {"batch_sizes": "1", "prefill_buckets": "", "max_batch_size": 32}
ALONE: Final[Mapping[str, Any]] = {**EAGER, "prefill_chunk": 512, "no_speculate": True}
WAYS: Final[Mapping[str, Mapping[str, Any]]] = {
    "eager, chunks of 16": {**EAGER, "prefill_chunk": 16, "no_speculate": True},
    "eager, chunks of 64, drafts": {**EAGER, "prefill_chunk": 64},
    "graphs, chunks of 256": {"prefill_chunk": 256, "no_speculate": True},
    "graphs, chunks of 512, drafts": {"prefill_chunk": 512},
}

Bits = tuple[tuple[Any, ...], ...]
"""Of an answer: id and log-probabilities of each token."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    prompt: list[int]
    options: dict[str, Any]


def questions(count: int) -> list[Asked]:
    draw = random.Random(20)
    words = [draw.randrange(1000, 40_000) for _ in range(60)]
    common = draw.choices(words, k=COMMON)
    found = []
    for number in range(count):
        own = draw.choices(words, k=draw.randint(1, 120))
        prompt = [*common, *own] if number % 3 == 0 else own
        if number % 5 == 0:
            prompt += prompt[-40:] * 2  # goes round, so that drafts are right
        found.append(Asked(prompt=prompt, options=_options(number)))
    return found


def _options(number: int) -> dict[str, Any]:
    options: dict[str, Any] = {"logprobs": TOP, "stop": {"ignore_eos": True}}
    if number % 4 == 1:
        options["sampling"] = {"temperature": 0.9, "top_p": 0.95, "seed": number}
    if number % 16 == 5:
        options["sampling"] |= {"presence_penalty": 0.4, "repetition_penalty": 1.1}
    return options


class Asker:
    """One stream to a worker."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker
        self._client: DecodeClient = worker.client()

    def answers(self, asked: Sequence[Asked], salt: str) -> list[Bits]:
        """Of requests that come at once; an empty salt: each has a cache of its own."""
        names = [uuid.uuid4().hex for _ in asked]
        for name, one in zip(names, asked, strict=True):
            options = {**one.options, "cache_salt": salt or name}
            self._client.start(name, self._worker.request(one.prompt, TOKENS, **options))
        return [self._bits(name) for name in names]

    def start(self, prompt: list[int]) -> str:
        """A request beside others."""
        name = uuid.uuid4().hex
        self._client.start(name, self._worker.request(prompt, 1, cache_salt=name))
        return name

    def end(self, name: str) -> None:
        self._client.finish(name, ANSWER_S)

    def _bits(self, name: str) -> Bits:
        found = list[tuple[Any, ...]]()
        while (response := self._client.next(name, ANSWER_S)).WhichOneof("event") == "delta":
            found += [_report(one) for one in response.delta.logprobs]
        if response.WhichOneof("event") != "finished":
            raise SystemExit(f"a request failed: {response}")
        return tuple(found)


def _report(one: pb.TokenLogprob) -> tuple[Any, ...]:
    return one.token_id, one.logprob, *((top.token_id, top.logprob) for top in one.top)


def alone(asker: Asker, asked: Sequence[Asked]) -> list[Bits]:
    return [asker.answers([one], "")[0] for one in asked]


def in_batches(asker: Asker, asked: Sequence[Asked], salt: str, seed: int) -> list[Bits]:
    """In a random order, in batches of sizes that take turns, every other one beside a prompt that
    is longer than all of them."""
    draw = random.Random(seed)
    order = draw.sample(range(len(asked)), len(asked))
    found: list[Bits] = [()] * len(asked)
    begin, number = 0, 0
    while begin < len(order):
        batch = order[begin : begin + BATCHES[number % len(BATCHES)]]
        beside = [asker.start(draw.choices(range(1000, 40_000), k=LONGER))] if number % 2 else []
        answers = asker.answers([asked[place] for place in batch], salt)
        for name in beside:
            asker.end(name)
        for place, bits in zip(batch, answers, strict=True):
            found[place] = bits
        begin, number = begin + len(batch), number + 1
    return found


def differing(found: Sequence[Bits], expected: Sequence[Bits]) -> list[int]:
    return [place for place, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]


def trials(
    home: Path, precision: str, asked: Sequence[Asked]
) -> Iterator[tuple[str, list[int], float]]:
    """Each trial's name, the prompts whose bits differ, and its seconds."""
    weights, _, kv = precision.partition(":")
    fixed = {"quantization": weights, "kv_dtype": kv}
    with asking(home, {**fixed, **ALONE}) as asker:
        expected = alone(asker, asked)
        begun = time.monotonic()
        found = in_batches(asker, asked, "", 1)
        yield "eager, whole prompts", differing(found, expected), time.monotonic() - begun
    for way, settings in WAYS.items():
        with asking(home, {**fixed, **settings}) as asker:
            shared = uuid.uuid4().hex
            for name, salt in ((way, ""), (f"{way}, shared", shared), (f"{way}, again", shared)):
                begun = time.monotonic()
                found = in_batches(asker, asked, salt, len(name))
                yield name, differing(found, expected), time.monotonic() - begun


class asking:  # noqa: N801 - used as a function
    """A worker with these settings, and a stream to it."""

    def __init__(self, home: Path, settings: Mapping[str, Any]) -> None:
        self._home = home
        self._settings = {**AS_SERVED, **settings}
        self._stack = ExitStack()

    def __enter__(self) -> Asker:
        settings = dict(self._settings)
        if settings["batch_sizes"] == EAGER["batch_sizes"]:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            settings["cache_dir"] = folder  # which has no graphs
        else:
            capture(self._home, settings)
            settings["wait_for_graphs"] = True
        redis = self._stack.enter_context(start_redis(self._home / "redis-bits"))
        worker = decode_worker(self._home, redis.url, MODEL, **settings)
        return Asker(self._stack.enter_context(worker))

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="keeps graphs between runs")
    parser.add_argument("--precisions", default=PRECISIONS)
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    asked = questions(options.prompts)
    rows, wrong = list[list[str]](), 0
    with home_folder(options.home) as home:
        for precision in options.precisions.split(","):
            for name, places, seconds in trials(home, precision, asked):
                wrong += len(places)
                print(f"{precision}, {name}: {len(places)} differ", places[:8], flush=True)
                rows.append([precision, name, str(len(asked)), str(len(places)), f"{seconds:.0f}"])
    record("same_bits", ["precision", "way", "prompts", "that differ", "s"], rows)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
