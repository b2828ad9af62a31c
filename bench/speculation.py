"""Speculation by prompt lookup: a worker that drafts beside one that does not, in turn over HTTP.

    python -m bench speculation [--home PATH] [--rounds 3] [--tokens 192]

Prompts are those of ``bench/prompts``: code to edit, questions about a given text, and free text,
each as a chat of the demo model, greedily answered up to its end or to so many tokens. All answers
are compared first, and one that is drawn by chance: drafts change no token. A stream alone goes
through the prompts one by one; of 16 at once each prompt has several. Tokens a second are of whole
requests; prompts are in the prefix cache, as that comparison has left them there. Ratios are
medians of those of each round. Tokens a step don't depend on what else the machine does.
"""

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from bench._stream_client import Streamed, burst, stream
from bench._workers import MODEL, Server, home_folder, prompts, servers
from bench.figures import record

KINDS: Final = {"editing": "editing code", "answering": "from a given text", "free": "free text"}
STREAMS: Final = (1, 16)
SAMPLED: Final = {"temperature": 1.0, "top_p": 0.9, "seed": 11}
ANSWER_S: Final = 120.0

Bodies = Sequence[dict[str, Any]]


def bodies_of(prompts_of_kind: Sequence[list[int]], tokens: int) -> list[dict[str, Any]]:
    ask = {"model": MODEL, "max_tokens": tokens, "temperature": 0}
    return [{**ask, "prompt": prompt} for prompt in prompts_of_kind]


def answers(server: Server, bodies: Bodies) -> list[list[int]]:
    """Token ids of whole answers."""
    url = f"http://127.0.0.1:{server.port}/v1/completions"
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as client:
        found = [client.post(url, json={**body, "return_token_ids": True}) for body in bodies]
    return [list(one.raise_for_status().json()["choices"][0]["token_ids"]) for one in found]


def require_same(on: Server, off: Server, bodies: Bodies) -> int:
    """How many tokens both gave alike; ends the program where they differ."""
    asked = [*bodies, {**bodies[0], **SAMPLED}]
    ours, theirs = answers(on, asked), answers(off, asked)
    if ours != theirs:
        raise SystemExit("drafts have changed tokens")
    return sum(map(len, ours))


async def one_by_one(port: int, bodies: Bodies) -> list[Streamed]:
    return [await stream(port, body) for body in bodies]


@dataclass(frozen=True, kw_only=True)
class Speed:
    tokens_per_s: float
    tokens_per_step: float
    """Of all streams together."""


def steps_of(server: Server) -> int:
    status = server.worker.status()
    return int(status.graph_steps + status.eager_steps)


def speed(server: Server, bodies: Bodies, streams: int) -> Speed:
    steps, begun = steps_of(server), time.monotonic()
    if streams == 1:
        found = asyncio.run(one_by_one(server.port, bodies))
    else:
        copies = -(-streams // len(bodies))
        found = asyncio.run(burst(server.port, (list(bodies) * copies)[:streams]))
    elapsed = time.monotonic() - begun
    if wrong := next((one.error for one in found if one.error), ""):
        raise SystemExit(f"a request failed: {wrong[:300]}")
    tokens = sum(one.tokens for one in found)
    done = steps_of(server) - steps
    return Speed(tokens_per_s=tokens / elapsed, tokens_per_step=tokens / done)


def rows(on: Server, off: Server, home: Path, options: argparse.Namespace) -> Iterator[list[str]]:
    for kind in options.kinds.split(","):
        name = KINDS[kind]
        bodies = bodies_of(prompts(home, kind), options.tokens)
        same = require_same(on, off, bodies)
        for streams in STREAMS:
            found = [
                alternating(on, off, bodies, streams, number) for number in range(options.rounds)
            ]
            row = [name, str(streams), *cells(found), str(same)]
            print(", ".join(row), flush=True)
            yield row


def alternating(
    on: Server, off: Server, bodies: Bodies, streams: int, number: int
) -> tuple[Speed, Speed]:
    """One round; who goes first takes turns."""
    order = (on, off) if number % 2 else (off, on)
    speeds = {server.port: speed(server, bodies, streams) for server in order}
    return speeds[on.port], speeds[off.port]


def cells(found: Sequence[tuple[Speed, Speed]]) -> list[str]:
    ours, theirs = ([one.tokens_per_s for one in column] for column in zip(*found, strict=True))
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    steps = statistics.median(a.tokens_per_step / b.tokens_per_step for a, b in found)
    speeds = (f"{statistics.median(one):.0f}" for one in (ours, theirs))
    return [*speeds, f"{ratio:.2f}", f"{steps:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="keeps graphs between runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--kinds", default=",".join(KINDS))
    options = parser.parse_args()
    with (
        home_folder(options.home) as home,
        servers(home, [{}, {"no_speculate": True}]) as (on, off),
    ):
        found = list(rows(on, off, home, options))
    headings = [
        "answer",
        "streams",
        "drafts, tokens/s",
        "none, tokens/s",
        "ratio",
        "tokens a step, ratio",
    ]
    record("speculation", [*headings, "tokens alike"], found)


if __name__ == "__main__":
    main()
