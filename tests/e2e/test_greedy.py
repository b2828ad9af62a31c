"""Greedy fp32 output is transformers', token for token: eager and from graphs, on one rank and two.

The whole path is real: a compile worker captures, the decode worker fetches, verifies, pads and
replays; SmolLM2's nine query heads are dealt five and four, and both ranks hold the same KV head.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.redis_server import start_redis
from tests.support.compile_worker import compile_worker
from tests.support.decode_worker import DecodeClient, DecodeWorker, decode_worker, eventually

PROMPTS = [
    "The capital of France is",
    "Write a short poem about the sea.\n",
    "def fibonacci(n):",
    "In 1969, the first",
    "Water boils at",
    "Dear Sir or Madam,",
    "The three primary colours are",
    "Once upon a time, in a small village,",
    "1, 1, 2, 3, 5, 8,",
    "A recipe for pancakes:",
    "The mitochondria",
    "Q: What is the largest planet?\nA:",
    "import numpy as np\n",
    "To be, or not to be,",
    "Photosynthesis is the process by which",
    "SELECT name FROM users WHERE",
    "The quick brown fox",
    "Albert Einstein was born in",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "My favourite season is autumn because",
]
TOKENS = 48
FEW, EAGER_TOKENS = 8, 16
"""Prompts, and tokens of them, that are enough where only what all have in common can differ: eager
steps from graphs. For two ranks and for padded steps one batch is."""
GRAPHS = {1: "1,8", 2: "8"}
"""For each number of ranks. What ranks add to a step does not depend on the requests in it."""
AT_ONCE = {1: (1, 3, 8), 2: (3, 8)}
"""Requests; 3 are padded to 8."""
Continuation = Callable[[tuple[int, ...], tuple[int, ...]], list[int]]


@pytest.fixture(scope="module")
def prompts(demo_model: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in PROMPTS]


@pytest.fixture(scope="module")
def greedy_continuation(transformers_model: Any) -> Continuation:
    """transformers' choice at every position of the output, each given the output before it.

    Equal to the output if and only if greedy version would give the output, and one forward pass
    instead of one for each token; none for an output that was judged before.
    """

    @functools.cache
    def continuation(prompt: tuple[int, ...], output: tuple[int, ...]) -> list[int]:
        with torch.inference_mode():
            logits = transformers_model(torch.tensor([prompt + output])).logits[0]
        choices: list[int] = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        return choices

    return continuation


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / demo_model.name).symlink_to(demo_model)
    return home


@pytest.fixture(scope="module")
def redis_url(home: Path) -> Iterator[str]:
    with start_redis(home / "redis") as server:
        yield server.url


def generate(
    client: DecodeClient, worker: DecodeWorker, prompts: list[list[int]], tokens: int
) -> list[list[int]]:
    """All prompts at once."""
    names = [f"{id(prompts)}-{index}" for index in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        client.start(name, worker.request(prompt, tokens, stop={"ignore_eos": True}))
    answers = [client.finish(name, 120) for name in names]
    assert all(answer.reason == pb.FINISH_REASON_LENGTH for answer in answers)
    return [answer.token_ids for answer in answers]


def check(
    at_once: int,
    worker: DecodeWorker,
    prompts: list[list[int]],
    greedy_continuation: Continuation,
    tokens: int = TOKENS,
) -> None:
    client = worker.client()
    outputs = []
    for first in range(0, len(prompts), at_once):
        outputs += generate(client, worker, prompts[first : first + at_once], tokens)
    assert all(len(output) == tokens for output in outputs)
    for text, prompt, output in zip(PROMPTS, prompts, outputs, strict=False):
        wanted = greedy_continuation(tuple(prompt), tuple(output))
        assert output == wanted, f"{at_once} at once: {text!r}"
    client.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tp", [1, 2])
def test_eager_then_graphs(
    tp: int,
    home: Path,
    redis_url: str,
    prompts: list[list[int]],
    greedy_continuation: Continuation,
) -> None:
    settings = {
        "home": home,
        "redis_url": redis_url,
        "model": "smollm2-135m-instruct",
        "batch_sizes": GRAPHS[tp],
        "tp": tp,
        "max_context_length": 256,
    }
    sizes = [int(size) for size in GRAPHS[tp].split(",")]
    with decode_worker(**settings) as worker:
        check(8, worker, prompts[:FEW], greedy_continuation, EAGER_TOKENS)
        eager = worker.status()
        assert (eager.graph_steps, eager.eager_steps > 0) == (0, True)
        with compile_worker(home, redis_url, capture_timeout_s=400, parallel_captures=2):
            eventually(lambda: len(worker.status().graphs) == len(sizes), 400)
        for at_once in AT_ONCE[tp]:
            asked = prompts if (tp, at_once) == (1, 8) else prompts[:at_once]
            check(at_once, worker, asked, greedy_continuation)
        status = worker.status()
        assert (status.eager_steps, status.graph_steps > 0) == (eager.eager_steps, True)
        assert [graph.num_tokens for graph in status.graphs] == sizes
