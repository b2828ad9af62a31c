"""Streams over three workers that are killed, stopped, drained and lose their ranks meanwhile.

Greedy and drawn ones, with penalties, stop strings, grammars, schemas, tools and several choices.

``python -m tests.support.chaos_streams --streams 500 --seed 1`` prints what happened as JSON. Each
request's answer must be that of an undisturbed run: text, calls of tools, finish reasons, log
probabilities and usage, choice by choice. No request may fail.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import psutil

from precast.proto.decode.v1 import decode_service_pb2 as pb
from precast.system.redis_server import start_redis
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.gateway_stack import Gateway, Stack
from tests.support.models import write_model
from tests.support.plain_http import PLAIN
from tests.support.ports import free_ports
from tests.support.processes import words

MODEL: Final = "tiny"
WORKERS: Final = 3
CONTEXT: Final = 2048
TIMEOUT_S: Final = 300.0
DRAIN_S: Final = 1
SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Lima", "Oslo"]},
        "days": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 9},
        "note": {"type": "string", "maxLength": 60},
    },
    "required": ["city", "days", "note"],
    "additionalProperties": False,
}
TOOLS: Final = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}}
    for name in ("weather", "travel")
]
ONE_TOOL: Final = {"type": "function", "function": {"name": "travel"}}
ANSWER: Final = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA}}
GBNF: Final = 'root ::= line{4,30}\nline ::= [a-h]+ "-" [0-9]{2,4} ";"'
KINDS: Final[tuple[dict[str, Any], ...]] = (
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3, "n": 2},
    {"temperature": 1.3, "seed": 4, "stop": ["~!~", "zz"], "top_p": 0.9},
    {"temperature": 0, "frequency_penalty": 0.6, "presence_penalty": 0.3},
    {"temperature": 0.8, "seed": 5, "logprobs": 1},
    {"temperature": 1.0, "seed": 6, "stream": False},
    {"temperature": 1.5, "seed": 7, "ignore_eos": False, "top_k": 50},
    {"temperature": 1.0, "seed": 8, "guided_regex": "([a-f]{3,9} )+[0-9]{9}"},
    {"temperature": 1.2, "seed": 9, "grammar": GBNF, "n": 2},
    {"temperature": 1.0, "seed": 10, "messages": 1, "tools": TOOLS, "tool_choice": "required"},
    {"temperature": 0, "messages": 1, "tools": TOOLS, "tool_choice": ONE_TOOL, "stream": False},
    {"temperature": 1.0, "seed": 11, "messages": 1, "response_format": ANSWER, "n": 3},
    {"temperature": 1.1, "seed": 12, "messages": 1, "stop": ["~", "q"], "n": 2},
)
"""``messages``: of a chat, where the others are completions."""
TEMPLATE: Final = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def bodies(count: int, tokens: int) -> list[dict[str, Any]]:
    """Requests of every kind, no two alike."""
    return [_body(number, tokens, KINDS[number % len(KINDS)]) for number in range(count)]


def _body(number: int, tokens: int, kind: dict[str, Any]) -> dict[str, Any]:
    text = f"{number} of {'the ' * (number % 40)}"
    common = {"model": MODEL, "max_tokens": tokens, "ignore_eos": True, "stream": True, **kind}
    if "messages" not in kind:
        return {**common, "prompt": text}
    return {**common, "messages": [{"role": "user", "content": text}]}


@dataclass(kw_only=True)
class Choice:
    text: str = ""
    reason: str = ""
    logprobs: list[float] = field(default_factory=list)
    calls: dict[int, list[str]] = field(default_factory=dict)
    """Of tools, name and arguments; their ids are random."""

    def add(self, shown: dict[str, Any]) -> None:
        assert not self.reason, "something follows the end"
        said = shown.get("delta") or shown.get("message") or {}
        self.text += shown.get("text") or said.get("content") or ""
        for index, call in enumerate(said.get("tool_calls") or ()):
            parts = self.calls.setdefault(call.get("index", index), ["", ""])
            parts[0] += call["function"].get("name") or ""
            parts[1] += call["function"].get("arguments") or ""
        self.reason = shown["finish_reason"] or ""
        self.logprobs += (shown.get("logprobs") or {}).get("token_logprobs", ())


@dataclass(frozen=True, kw_only=True)
class Answer:
    choices: dict[int, Choice]
    usage: tuple[int, int]
    """Tokens of the prompt and of the output."""


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Answer:
    """The answer to a request, which must not fail."""
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    if not body["stream"]:
        answer = await client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return _answer([answer.json()])
    body = {**body, "stream_options": {"include_usage": True}}
    async with client.stream("POST", path, json=body) as response:
        whole = (await response.aread()).decode()
        assert response.status_code == 200, whole
    # httpx would also end lines at what other characters Unicode has for that
    lines = [line for line in whole.split("\n") if line.startswith("data: ")]
    *events, done = lines
    assert done == "data: [DONE]", done
    return _answer([json.loads(event.removeprefix("data: ")) for event in events])


def _answer(messages: Sequence[dict[str, Any]]) -> Answer:
    choices: dict[int, Choice] = {}
    usage = (0, 0)
    for message in messages:
        assert "error" not in message, message
        for shown in message["choices"]:
            choices.setdefault(shown["index"], Choice()).add(shown)
        if message.get("usage"):
            usage = (message["usage"]["prompt_tokens"], message["usage"]["completion_tokens"])
    assert all(choice.reason for choice in choices.values())
    return Answer(choices=choices, usage=usage)


@dataclass(kw_only=True)
class Fleet:
    """A gateway over three workers of one start, which brings back those that end."""

    gateway: Gateway
    workers: list[DecodeWorker]
    faults: Counter[str] = field(default_factory=Counter)

    def leader(self, index: int) -> psutil.Process:
        """Of the worker at an address, whichever process that is now."""
        port = int(self.workers[index].address.rpartition(":")[2])
        for process in psutil.Process(self.workers[0].process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if any(c.laddr.port == port for c in process.net_connections() if c.laddr):
                    return process
        raise ProcessLookupError(f"nobody listens on {port}")

    def rank(self, index: int) -> psutil.Process:
        return next(c for c in self.leader(index).children() if "rank" in words(c.pid))

    def ready(self) -> bool:
        return all(map(_is_ready, self.workers))

    def kill_worker(self, index: int) -> None:
        self.leader(index).kill()

    def stop_worker(self, index: int) -> None:
        self.leader(index).send_signal(signal.SIGSTOP)

    def kill_rank(self, index: int) -> None:
        self.rank(index).kill()

    def stop_rank(self, index: int) -> None:
        self.rank(index).send_signal(signal.SIGSTOP)

    def drain(self, index: int) -> None:
        """What runs after the deadline goes on elsewhere."""
        stub = self.workers[index].stub()
        with suppress(grpc.RpcError):  # it may be killed meanwhile
            stub.Drain(pb.DrainRequest(deadline_s=DRAIN_S), timeout=30)
            stub.Undrain(pb.UndrainRequest(), timeout=30)

    def strike(self, name: str, index: int) -> bool:
        """Whether the worker was there to be struck."""
        strikes: dict[str, Callable[[int], None]] = {
            "worker killed": self.kill_worker,
            "worker stopped": self.stop_worker,
            "rank killed": self.kill_rank,
            "rank stopped": self.stop_rank,
            "drained": self.drain,
        }
        try:
            strikes[name](index)
        except (ProcessLookupError, StopIteration, psutil.Error):
            return False
        self.faults[name] += 1
        return True

    def retries(self, kind: str = "retries") -> int:
        """Requests that went to another worker; ``resumptions``: with tokens that they had."""
        name = f'gateway_{kind}_total{{model="{MODEL}"}}'
        return int(self.gateway.metrics().get(name, 0))


def _is_ready(worker: DecodeWorker) -> bool:
    with grpc.insecure_channel(worker.address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=0.5)
        except grpc.FutureTimeoutError:
            return False
    return worker.is_ready()


@contextmanager
def fleet(home: Path, redis_url: str, *, tp: int = 1) -> Iterator[Fleet]:
    """Running on a tiny model with a long context; gone afterwards."""
    folder = write_model(home / "models" / MODEL, max_position_embeddings=CONTEXT)
    told = {"eos_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    first = free_ports(WORKERS)[0]
    front = Stack(redis_url=redis_url, models_dir=home / "models", started=[])
    settings = {"tp": tp, "batch_sizes": "1", "max_batch_size": 16, "max_waiting": 1024}
    address = f"127.0.0.1:{first}"
    with decode_worker(
        home, redis_url, MODEL, address=address, replicas=WORKERS, **settings
    ) as one:
        workers = [replace(one, address=f"127.0.0.1:{first + n}") for n in range(WORKERS)]
        gateway = front.gateway(wait_for=WORKERS, request_timeout_s=TIMEOUT_S * 5)
        try:
            yield Fleet(gateway=gateway, workers=workers)
        finally:
            gateway.kill()


async def answers(fleet: Fleet, asked: Sequence[dict[str, Any]]) -> list[Answer]:
    """To all of them, which are asked at once."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=fleet.gateway.url, timeout=TIMEOUT_S, limits=limits, trust_env=False, verify=PLAIN
    ) as client:
        return await asyncio.gather(*(ask(client, body) for body in asked))


async def again_and_again(
    fleet: Fleet,
    asked: Sequence[dict[str, Any]],
    expected: Sequence[Answer],
    chaos: Callable[[], None],
) -> int:
    """Ask, all at once and each anew when it is answered, while ``chaos`` lasts. Every answer is
    the expected one; how many there were."""
    striking = asyncio.create_task(asyncio.to_thread(chaos))
    count = 0

    async def keep_asking(client: httpx.AsyncClient, number: int) -> None:
        nonlocal count
        while True:
            assert await ask(client, asked[number]) == expected[number], asked[number]
            count += 1
            if striking.done():
                return

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=fleet.gateway.url, timeout=TIMEOUT_S, limits=limits, trust_env=False, verify=PLAIN
    ) as client:
        await asyncio.gather(*(keep_asking(client, number) for number in range(len(asked))))
    await striking
    return count


def run(home: Path, *, streams: int, tokens: int, seed: int, pause_s: float) -> dict[str, Any]:
    """Every request is answered as in an undisturbed run, while something happens to a worker
    every ``pause_s`` or so."""
    dice = random.Random(seed)
    asked = bodies(streams, tokens)
    with start_redis(home / "redis") as redis, fleet(home, redis.url) as running:
        begun = time.monotonic()
        expected = asyncio.run(answers(running, asked))
        undisturbed_s = time.monotonic() - begun
        ended = False

        def chaos() -> None:
            names = ("worker killed", "worker stopped", "rank killed", "rank stopped", "drained")
            while not ended:
                running.strike(dice.choice(names), dice.randrange(WORKERS))
                time.sleep(dice.uniform(0.5, 1.5) * pause_s)

        async def disturbed() -> list[Answer]:
            nonlocal ended
            striking = asyncio.create_task(asyncio.to_thread(chaos))
            try:
                return await answers(running, asked)
            finally:
                ended = True
                await striking

        begun = time.monotonic()
        found = asyncio.run(disturbed())
        seconds = time.monotonic() - begun
        retries, resumptions = running.retries(), running.retries("resumptions")
    wrong = [body for body, a, b in zip(asked, expected, found, strict=True) if a != b]
    assert not wrong, wrong[:3]
    return {
        "streams": streams,
        "tokens": sum(answer.usage[1] for answer in found),
        "as_undisturbed": len(found),
        "moved": retries,
        "with_tokens": resumptions,
        "faults": dict(running.faults),
        "undisturbed_s": round(undisturbed_s, 1),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.support.chaos_streams")
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pause-s", type=float, default=4.0, help="between two faults, about")
    arguments = parser.parse_args()
    os.environ.setdefault("PRECAST_LOG_LEVEL", "warning")
    with tempfile.TemporaryDirectory(prefix="precast-chaos-", ignore_cleanup_errors=True) as home:
        print(json.dumps(run(Path(home), **vars(arguments)), indent=1))


if __name__ == "__main__":
    main()
