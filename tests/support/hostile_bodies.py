"""Bodies and schemas that nobody means well with, against a gateway with a real worker.

``python -m tests.support.hostile_bodies --count 10000 --seed 1`` makes a stack with a tiny model
and prints what came of it as JSON; exit code 1 if anything was answered with a 5xx, hung, or was no
error as OpenAI's clients want them, or if gateway or leader has grown.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import psutil

from precast.system.redis_server import start_redis
from tests.support.damage import damaged
from tests.support.decode_worker import DecodeWorker, decode_worker
from tests.support.gateway_stack import Gateway, Stack
from tests.support.json_schemas import CASES
from tests.support.models import write_model
from tests.support.plain_http import PLAIN

MODEL: Final = "tiny"
ANSWER_S: Final = 30.0
"""Longest that an answer may take."""
GROWTH_MB: Final = 64
"""What allocators, caches of grammars and tokenizers may keep beyond the first part's."""
MESSAGES: Final = [{"role": "user", "content": "hi"}]
TOOL: Final = {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}
SCHEMA: Final = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"]}
GOOD: Final[dict[str, list[dict[str, Any]]]] = {
    "/v1/completions": [
        {"prompt": "ab", "max_tokens": 2, "logprobs": 1, "echo": True, "n": 2},
        {"prompt": [[1, 2], [3]], "max_tokens": 2, "logit_bias": {"5": 1}, "stop": ["a"]},
        {"prompt": "a", "max_tokens": 3, "structured_outputs": {"regex": "[ab]+c"}},
        {"prompt": "a", "max_tokens": 3, "guided_grammar": 'start: "a" | "b" start'},
        {"prompt": "a", "max_tokens": 3, "grammar": 'root ::= "a" | "b" root'},
    ],
    "/v1/chat/completions": [
        {"messages": MESSAGES, "max_tokens": 2, "stream": True},
        {
            "messages": MESSAGES,
            "max_tokens": 3,
            "tools": [{"type": "function", "function": TOOL}],
            "tool_choice": "required",
        },
        {
            "messages": MESSAGES,
            "max_tokens": 3,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": SCHEMA},
            },
        },
    ],
    "/v1/responses": [
        {"input": "hi", "max_output_tokens": 2, "tools": [{"type": "function", **TOOL}]},
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            "max_output_tokens": 2,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
            "previous_response_id": "resp_" + "0" * 32,
        },
    ],
    "/v1/messages": [
        {
            "messages": MESSAGES,
            "max_tokens": 2,
            "tools": [{"name": "f", "input_schema": SCHEMA}],
            "thinking": {"type": "disabled"},
        }
    ],
    "/v1/embeddings": [
        {"input": ["a", "b"], "dimensions": 3, "encoding_format": "base64"},
        {"input": [[1, 2], [3]], "pooling": "last", "normalize": False},
    ],
    "/tokenize": [{"prompt": "ab"}, {"messages": MESSAGES}],
    "/detokenize": [{"tokens": [1, 2]}],
}
"""By path; each is good as it stands, but for the model."""
STRANGE: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 1e308, 5e-324, 2**31, 2**63, -(2**64), 10**400),
    *("", "\x00", "\ud800", "a" * 5000, "é日\U0001f600", "%s%n", "../../x", "<|im_end|>", "!say a"),
    *([], {}, [[]], [None], {"": ""}, {"$ref": "#"}, {"type": "text"}, [{}] * 300, ["a"] * 300),
    *({"type": "object"}, {"__proto__": 1}, {"a" * 2000: 1}),
)
PATTERNS: Final = (
    *("(a*)*b", "(a|a)*c", "(x+x+)+y", "[", "(?=a)b", r"\1", "a{1,100000}", "(?P<n>a)", ".{,9999}"),
    *("^$", r"\p{L}+", "(((((((((a)))))))))*", "a" * 3000, r"[\d-x]", "(?i)a", "\x00"),
)
KEYWORDS: Final[tuple[tuple[str, Any], ...]] = (
    *(("$ref", ref) for ref in ("#", "#/a", "#/properties/a", "http://x/y", "", 5)),
    *(("pattern", pattern) for pattern in PATTERNS),
    *(("enum", values) for values in ([], [1] * 2000, ["\ud800"], [{"a": [1e400]}], 5)),
    *((name, count) for name in ("minItems", "maxLength") for count in (-1, 10**9, 1.5, "a")),
    *(("type", kind) for kind in ("x", ["string", "null"], 5, [])),
    *(("multipleOf", number) for number in (0, -1, 1e-300, 3)),
    *(("additionalProperties", more) for more in (False, {"$ref": "#"}, 5)),
    *(("x-guidance", {"lenient": True}), ("format", "made-up"), ("const", "\x00")),
    *(("not", {}), ("oneOf", [{}, {}]), ("allOf", [{"type": "string"}, {"type": "null"}])),
)
Body = tuple[str, bytes]


def bodies(seed: int) -> Iterator[Body]:
    """Paths and bodies, for ever; the same for the same seed."""
    rng = random.Random(seed)
    while True:
        path = rng.choice(list(GOOD))
        with suppress(RecursionError):  # deeper than we can write it
            data = _body(rng, path)
            if rng.random() < 0.15:
                data = damaged(rng, data, _not_a_number, _begun_again)
            yield path, data


def _body(rng: random.Random, path: str) -> bytes:
    body = {"model": MODEL, **deepcopy(rng.choice(GOOD[path]))}
    for _ in range(rng.choice((0, 1, 1, 1, 2, 4))):
        rng.choice(CHANGES)(rng, body)
    return json.dumps(body).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _replace(rng: random.Random, body: Any) -> None:
    container, key = rng.choice(list(_places(body)))
    container[key] = deepcopy(rng.choice(STRANGE))


def _drop(rng: random.Random, body: Any) -> None:
    container, key = rng.choice(list(_places(body)))
    del container[key]
    body.setdefault("model", MODEL)


def _swap(rng: random.Random, body: Any) -> None:
    """One part of it in the place of another, or within itself."""
    (one, key), (other, place) = rng.choices(list(_places(body)), k=2)
    one[key] = deepcopy(other[place])


def _add(rng: random.Random, body: Any) -> None:
    names = [name for good in GOOD.values() for one in good for name in one]
    body[rng.choice([*names, "user", "seed", "top_p", "n", "bogus", ""])] = rng.choice(STRANGE)


def _nest(rng: random.Random, body: Any) -> None:
    container, key = rng.choice(list(_places(body)))
    for _ in range(rng.choice((3, 60, 190, 250))):
        container[key] = rng.choice(({"a": container[key]}, [container[key]]))


def hostile_schema(rng: random.Random) -> Any:
    """Others' good ones, with keywords that hurt."""
    schema = deepcopy(rng.choice(CASES).schema)
    for _ in range(rng.randrange(3)):
        if isinstance(schema, dict):
            found = [schema, *(c[k] for c, k in _places(schema) if isinstance(c[k], dict))]
            name, value = rng.choice(KEYWORDS)
            rng.choice(found)[name] = deepcopy(value)
    return schema


def _schema(rng: random.Random, body: Any) -> None:
    """One where there is one."""
    schema = hostile_schema(rng)
    for container, key in list(_places(body)):
        if key in ("schema", "parameters", "input_schema"):
            container[key] = schema
            return
    body["structured_outputs"] = {"json": schema}


def _pattern(rng: random.Random, body: Any) -> None:
    body.pop("grammar", None)
    body["structured_outputs"] = {"regex": rng.choice(PATTERNS)}


def _grammar(rng: random.Random, body: Any) -> None:
    text = rng.choice(
        (
            "start: start",
            'start: "a" start | start "b"',
            "start: " + " ".join(["A"] * 500) + "\nA: /a*/",
            'root ::= root | ""',
            "root ::= [",
            "start: %import",
            "\x00",
            'start: ("a"' * 300 + ")" * 300,
        )
    )
    body[rng.choice(("guided_grammar", "grammar"))] = text


CHANGES: Final[Sequence[Callable[[random.Random, Any], None]]] = (
    *(_replace, _replace, _replace, _drop, _swap, _add, _nest),
    *(_schema, _schema, _pattern, _grammar),
)


def _not_a_number(_: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + b"NaN" + data[at:]


def _begun_again(_: random.Random, data: bytes, at: int) -> bytes:
    return data + data[:at]


@dataclass(kw_only=True)
class Found:
    """What came of them."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """What should not be, with the body's beginning."""
    slowest_s: float = 0.0
    grown_mb: dict[str, float] = field(default_factory=dict)

    def see(self, body: Body, status: int, text: str, took_s: float) -> None:
        self.statuses[status] += 1
        self.slowest_s = max(self.slowest_s, took_s)
        if status >= 500 or not _as_openai(status, text) or took_s > ANSWER_S:
            self.wrong.append(
                f"{body[0]} {status} {text[:200]!r} {took_s:.1f} s: {body[1][:1500]!r}"
            )


def _as_openai(status: int, text: str) -> bool:
    if status == 200:
        return '"code":"internal_error"' not in text
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    kinds = {"invalid_request_error"}
    if json.loads(text).get("type") == "error":  # as Anthropic's clients want them
        kinds.add("not_found_error")
    return isinstance(error["message"], str) and error["type"] in kinds


async def attack(url: str, given: Sequence[Body], found: Found, at_once: int = 8) -> None:
    """Sends them all, some at once."""
    left = iter(given)

    async def send(client: httpx.AsyncClient) -> None:
        for path, data in left:
            started = time.monotonic()
            try:
                answer = await client.post(
                    path, content=data, headers={"content-type": "application/json"}
                )
            except httpx.HTTPError as error:
                found.wrong.append(f"{path} {error!r}: {data[:1500]!r}")
                continue
            found.see((path, data), answer.status_code, answer.text, time.monotonic() - started)

    async with httpx.AsyncClient(base_url=url, timeout=2 * ANSWER_S, verify=PLAIN) as client:
        await asyncio.gather(*(send(client) for _ in range(at_once)))


def batter(gateway: Gateway, worker: DecodeWorker, count: int, seed: int) -> Found:
    """So many bodies; memory is measured from when a quarter of them is through."""
    stream = bodies(seed)
    given = [next(stream) for _ in range(count)]
    found, restarts = Found(), worker.status().restarts
    processes = {"gateway": gateway.process.pid, "leader": worker.process.pid}
    asyncio.run(attack(gateway.url, given[: count // 4], found))
    before = {name: _memory_mb(pid) for name, pid in processes.items()}
    asyncio.run(attack(gateway.url, given[count // 4 :], found))
    found.grown_mb = {name: _memory_mb(pid) - before[name] for name, pid in processes.items()}
    if worker.status().restarts != restarts:
        found.wrong.append("the ranks were restarted")
    good = {"model": MODEL, "prompt": "ab", "max_tokens": 3}
    if (last := gateway.post("/v1/completions", json=good)).status_code != 200:
        found.wrong.append(f"a good request then: {last.status_code} {last.text}")
    found.wrong += [
        f"{name} has grown by {grown:.0f} MB"
        for name, grown in found.grown_mb.items()
        if grown > GROWTH_MB
    ]
    return found


def _memory_mb(pid: int) -> float:
    return psutil.Process(pid).memory_info().rss / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_redis(Path(folder) / "redis") as redis:
        home = Path(folder)
        write_model(home / "models" / MODEL)
        stack = Stack(redis_url=redis.url, models_dir=home / "models", started=[])
        try:
            with decode_worker(home, redis.url, MODEL, batch_sizes="1,4") as worker:
                gateway = stack.gateway(responses_lifetime_s=60)
                found = batter(gateway, worker, options.count, options.seed)
        finally:
            for process in stack.started:
                process.kill()
                process.wait()
    statuses = dict(sorted(found.statuses.items()))
    told = {"statuses": statuses, "slowest_s": found.slowest_s, "grown_mb": found.grown_mb}
    print(json.dumps(told | {"wrong": found.wrong}, indent=1))
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
