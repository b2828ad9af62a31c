"""Adapters of a real worker behind a gateway: each request's own, side by side in a batch."""

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support import forked
from tests.support.adapters import write_adapter, write_merged
from tests.support.command import PROGRAM
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.gateway_stack import Gateway, Stack, eventually
from tests.support.models import VOCABULARY

MODEL = "tiny"
NAMES = (MODEL, "first", "second")
TOKENS = 24
PROMPT = [(i * i + 3 * i) % (VOCABULARY - 4) for i in range(70)]
"""Two KV blocks and more."""


@pytest.fixture(scope="module")
def folders(tiny_home: Path) -> dict[str, Path]:
    model = tiny_home / "models" / MODEL
    targets = (("q_proj", "v_proj", "o_proj", "gate_proj"), ("k_proj", "up_proj", "down_proj"))
    return {
        name: write_adapter(tiny_home / name, model, rank=3 + seed, targets=own, seed=seed)
        for seed, (name, own) in enumerate(zip(NAMES[1:], targets, strict=True))
    }


@pytest.fixture(scope="module")
def expected(tiny_home: Path, folders: dict[str, Path]) -> dict[str, list[int]]:
    """Tokens that transformers finds likeliest, with each adapter merged into the weights."""
    from transformers import AutoModelForCausalLM

    plain, found = tiny_home / "models" / MODEL, {}
    for name in NAMES:
        merged = tiny_home / f"merged-{name}"
        folder = plain if name == MODEL else write_merged(merged, plain, folders[name])
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ids = list(PROMPT)
        with torch.inference_mode():
            for _ in range(TOKENS):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        found[name] = ids[len(PROMPT) :]
    assert len({tuple(ids) for ids in found.values()}) == len(NAMES)
    return found


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def worker(
    tiny_home: Path, tiny_redis: str, folders: dict[str, Path], request: pytest.FixtureRequest
) -> Iterator[DecodeWorker]:
    adapters = ",".join(f"{name}={folder}" for name, folder in folders.items())
    settings = {"tp": request.param, "batch_sizes": "1,4", "adapter": adapters}
    with decode_worker(tiny_home, tiny_redis, MODEL, **settings) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(worker: DecodeWorker, tiny_home: Path, tiny_redis: str) -> Iterator[Gateway]:
    stack = Stack(redis_url=tiny_redis, models_dir=tiny_home / "models", started=[])
    try:
        yield stack.gateway()
    finally:
        for process in stack.started:
            process.kill()
            process.wait()


@pytest.fixture
def ask(gateway: Gateway) -> Callable[[str], list[int]]:
    def tokens(model: str) -> list[int]:
        body = {"model": model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        answer = gateway.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    return tokens


def test_each_name_is_listed_with_its_model(gateway: Gateway) -> None:
    found = {one["id"]: one.get("parent") for one in gateway.get("/v1/models").json()["data"]}
    assert found == {MODEL: None, "first": MODEL, "second": MODEL}
    assert gateway.post("/tokenize", json={"model": "first", "prompt": "a"}).status_code == 200
    unnamed = gateway.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
    assert unnamed.json()["model"] == MODEL


def test_a_batch_has_each_request_s_own(
    ask: Callable[[str], list[int]], expected: dict[str, list[int]]
) -> None:
    order = [*NAMES, *reversed(NAMES), *NAMES]
    with ThreadPoolExecutor(len(order)) as clients:
        answers = list(clients.map(ask, order))
    assert answers == [expected[name] for name in order]


def test_what_one_has_cached_is_no_other_s(
    ask: Callable[[str], list[int]], expected: dict[str, list[int]]
) -> None:
    for name in [*NAMES, *NAMES]:
        assert ask(name) == expected[name]


@pytest.fixture
def swapped(folders: dict[str, Path]) -> Iterator[None]:
    """Each adapter's files have the other's bytes."""
    paths = [path for folder in folders.values() for path in sorted(folder.iterdir())]
    before = [path.read_bytes() for path in paths]
    half = len(paths) // 2
    for path, content in zip(paths, before[half:] + before[:half], strict=True):
        path.write_bytes(content)
    yield
    for path, content in zip(paths, before, strict=True):
        path.write_bytes(content)


@pytest.mark.usefixtures("swapped")
def test_requests_go_on_with_their_adapters_when_ranks_are_lost(
    worker: DecodeWorker, ask: Callable[[str], list[int]], expected: dict[str, list[int]]
) -> None:
    """As they were when the worker started, whatever becomes of the files."""
    before = worker.ranks()
    with ThreadPoolExecutor(3) as clients:
        answers = [clients.submit(ask, name) for name in NAMES]
        os.kill(before[0], signal.SIGKILL)
        assert [answer.result(60) for answer in answers] == [expected[name] for name in NAMES]
    eventually(lambda: set(worker.ranks()).isdisjoint(before))


def test_unknown_names_are_refused(gateway: Gateway) -> None:
    body = {"model": "third", "prompt": PROMPT, "max_tokens": 1}
    assert gateway.post("/v1/completions", json=body).status_code == 404


def test_a_folder_that_is_none_ends_the_start(tiny_home: Path, tiny_redis: str) -> None:
    log = tiny_home / "refused.log"
    flags = [f"--home={tiny_home}", f"--redis-url={tiny_redis}", f"--model={MODEL}"]
    flags += ["--listen=127.0.0.1:0", f"--adapter=x={tiny_home}"]
    with log.open("wb") as file:
        process = forked.start(PROGRAM, ["decode-worker", *flags], stdout=file, stderr=file)
        assert process.wait(30) == 2
    assert log.read_text().splitlines()[-1] == (
        f"precast: adapter x: {tiny_home}/adapter_config.json is missing"
    )
