"""What constrained output costs: masks, and a constrained row among others.

    python -m bench.constraints [masks] [beside] [schemas] [--count 500] [--rounds 5]

``masks``: processor time of a row's mask along answers to some seventy schemas, for the demo
model's vocabulary of 49,152 and for one of 151,936 that is made of pairs of its tokens; the first
time that a grammar is used, and later. ``beside``: 16 greedy streams of the demo model, and the
same with a schema for one of them, in turns: what a token of the others takes. ``schemas``: whether
answers to so many schemas validate that end by themselves.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from tokenizers import Tokenizer

from precast.models.importing.importer import import_model
from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.redis_server import start_redis
from services.decode_worker.constraints.grammar import Grammar
from services.decode_worker.constraints.matcher import Matcher, Vocabulary
from tests.support.columns import generate
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.json_schemas import CASES, composed
from tests.support.structured_output import judged

DEMO: Final = "smollm2-135m-instruct"
LARGE: Final = 151_936
STREAMS: Final = 16
TOKENS: Final = 160
_END: Final = "<|im_end|>"
_ENDLESS: Final = r'{"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 99}'


def demo_model() -> Path:
    home = os.environ.get("PRECAST_HOME") or Path(__file__).parents[1] / ".precast"
    return import_model(DEMO, Path(home) / "models", report=print).path


def enlarged(tokenizer: Tokenizer, size: int) -> str:
    """A tokenizer.json with more tokens: pairs of those that there are."""
    data = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = data["model"]["vocab"]
    names, draw = list(vocabulary), random.Random(0)
    while len(vocabulary) < size:
        vocabulary.setdefault(draw.choice(names) + draw.choice(names), len(vocabulary))
    return json.dumps(data)


def masks(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [token for token in (tokenizer.token_to_id(_END),) if token is not None]
    print("masks of a row, us: p50, p95, p99, largest; compiling a grammar, ms: p50, largest")
    for size in (tokenizer.get_vocab_size(), LARGE):
        began = time.thread_time()
        vocabulary = Vocabulary(enlarged(tokenizer, size), size, ends)
        print(f"{size} tokens, learnt in {time.thread_time() - began:.2f} s")
        first, later, compiled = list[float](), list[float](), list[float]()
        for case in CASES:
            began = time.thread_time()
            grammar = Grammar(kind="json_schema", text=json.dumps(case.schema))
            matcher = vocabulary.compile(grammar)
            compiled.append(1e3 * (time.thread_time() - began))
            for value in case.valid:
                ids = tokenizer.encode(json.dumps(value, ensure_ascii=False)).ids
                first += times(matcher.copy(), ids)
                later += times(matcher.copy(), ids)
        print(f"  first use {_spread(first)}   later {_spread(later)}", end="")
        print(f"   compiling {statistics.median(compiled):.2f} {max(compiled):.2f}")


def times(matcher: Matcher, ids: list[int]) -> list[float]:
    """Processor time of each token's mask, us."""
    words = np.zeros(matcher.width, dtype=np.int32)
    found = []
    for token in ids:
        began = time.thread_time_ns()
        matcher.fill(words)
        found.append((time.thread_time_ns() - began) / 1e3)
        matcher.take(token)
    return found


def _spread(values: list[float]) -> str:
    points = [*np.percentile(values, (50, 95, 99)), max(values)]
    return " ".join(f"{point:.0f}" for point in points)


@contextmanager
def serving(folder: Path) -> Iterator[DecodeWorker]:
    with tempfile.TemporaryDirectory() as name, start_redis(Path(name) / "redis") as redis:
        home = Path(name)
        (home / "models").mkdir()
        (home / "models" / DEMO).symlink_to(folder)
        with decode_worker(
            home,
            redis.url,
            DEMO,
            quantization="q4_1",
            batch_sizes="1",
            max_batch_size=STREAMS,
            max_context_length=512,
        ) as worker:
            yield worker


def beside(worker: DecodeWorker, rounds: int) -> None:
    """Sent to the worker itself, without a gateway; steps are eager here."""
    plain, mixed = list[float](), list[float]()
    for number in range(2 * rounds + 2):
        constrained = number % 2 == 1
        taken = others_token_ms(worker, number, constrained=constrained)
        if number > 1:  # one of each to warm up
            (mixed if constrained else plain).append(taken)
    a, b = statistics.median(plain), statistics.median(mixed)
    print(f"a token of {STREAMS - 1} streams: {a:.2f} ms, beside a constrained one {b:.2f} ms")
    print(f"  ratio {b / a:.3f}; of pairs: ", end="")
    print(" ".join(f"{two / one:.3f}" for one, two in zip(plain, mixed, strict=True)))


def others_token_ms(worker: DecodeWorker, number: int, *, constrained: bool) -> float:
    """Of a burst, by the time until all are over: all streams are of one length."""
    endless = {"ignore_eos": True}
    starts = {
        f"{number}-{index}": worker.request([100 + index, 7 + number], TOKENS, stop=endless)
        for index in range(STREAMS)
    }
    if constrained:
        starts[f"{number}-0"].constraint.CopyFrom(pb.OutputConstraint(json_schema=_ENDLESS))
    began = time.perf_counter()
    answers = generate(worker, starts, 300)
    assert all(len(answer.token_ids) == TOKENS for answer in answers.values())
    return 1e3 * (time.perf_counter() - began) / TOKENS


def schemas(worker: DecodeWorker, folder: Path, count: int) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = composed(count)
    verdict = judged(worker, tokenizer, wanted, max_tokens=200)
    print(f"{count} schemas: {verdict.ended} answers ended, {len(verdict.wrong)} are not valid")
    for schema, text in verdict.wrong[:5]:
        print(f"  {json.dumps(schema)}\n  {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    parts = options.parts or ["masks", "beside", "schemas"]
    folder = demo_model()
    if "masks" in parts:
        masks(folder)
    if {"beside", "schemas"}.intersection(parts):
        with serving(folder) as worker:
            if "beside" in parts:
                beside(worker, options.rounds)
            if "schemas" in parts:
                schemas(worker, folder, options.count)


if __name__ == "__main__":
    main()
