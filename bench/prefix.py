"""What the prefix cache saves: time to the first token over HTTP.

    python -m bench prefix [--home PATH] [--rounds 3]

**A chat** of eight turns grows to 4,000 tokens. Each turn's first token is set beside the same new
tokens as a prompt of their own, and beside the whole chat without its cache; a ``cache_salt`` of
its own keeps a request from what others have left. New tokens of a late turn attend to all before
them, which those alone don't. **32 requests** at once over one prefix of 1,024 tokens, each with 32
of its own behind it: with the prefix in the cache, without any cache, and where none of them came
before (the first one computes what the others wait for). Medians of the rounds.
"""

import argparse
import asyncio
import random
import statistics
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench._stream_client import Streamed, burst, stream
from bench._workers import MODEL, home_folder, servers
from bench.figures import record

TURNS: Final = 8
CHAT_TOKENS: Final = 4000
ANSWER: Final = 32
PREFIX: Final = 1024
OWN: Final = 32
REQUESTS: Final = 32


def ids(count: int) -> list[int]:
    return [random.randrange(1000, 40_000) for _ in range(count)]


def body(prompt: Sequence[int], tokens: int, salt: str) -> dict[str, Any]:
    ask = {"model": MODEL, "prompt": list(prompt), "max_tokens": tokens, "ignore_eos": True}
    return {**ask, "temperature": 0, "cache_salt": salt}


def salt() -> str:
    return uuid.uuid4().hex


def checked(found: Sequence[Streamed]) -> Sequence[Streamed]:
    if wrong := next((one.error or "nothing" for one in found if one.error or not one.pieces), ""):
        raise SystemExit(f"a request failed: {wrong[:300]}")
    return found


def first_s(port: int, prompt: Sequence[int], used: str, tokens: int = 1) -> float:
    return checked([asyncio.run(stream(port, body(prompt, tokens, used)))])[0].first_s


def chat(port: int) -> Iterator[tuple[int, int, float, float, float]]:
    """Of each turn: tokens before it and in it; seconds of it, of its tokens alone, of all."""
    new = (CHAT_TOKENS - TURNS * ANSWER) // TURNS
    own, told = salt(), list[int]()
    for _ in range(TURNS):
        turn = ids(new)
        with_cache = first_s(port, told + turn, own, ANSWER)
        yield (
            len(told),
            new,
            with_cache,
            first_s(port, turn, salt()),
            first_s(port, told + turn, salt()),
        )
        told += turn + ids(ANSWER)  # the answer as the client might have changed it


def chat_rows(port: int, rounds: int) -> Iterator[list[str]]:
    found = [list(chat(port)) for _ in range(rounds + 1)][1:]
    for number, turns in enumerate(zip(*found, strict=True), 1):
        cached, alone, whole = (statistics.median(one[i] for one in turns) for i in (2, 3, 4))
        ratio = statistics.median(one[2] / one[3] for one in turns)
        yield [
            str(number),
            str(turns[0][0]),
            str(turns[0][1]),
            *(f"{1000 * one:.0f}" for one in (cached, alone)),
            f"{ratio:.2f}",
            f"{1000 * whole:.0f}",
        ]


def firsts_s(port: int, prefix: Sequence[int], salts: Sequence[str]) -> float:
    """Mean of the seconds to the first tokens of requests that come at once."""
    bodies = [body([*prefix, *ids(OWN)], 2, used) for used in salts]
    return statistics.mean(one.first_s for one in checked(asyncio.run(burst(port, bodies))))


def shared(port: int) -> tuple[float, float, float]:
    """With the prefix cached, with nobody before them, and without a cache."""
    prefix, own = ids(PREFIX), salt()
    first_s(port, prefix, own)
    cached = firsts_s(port, prefix, [own] * REQUESTS)
    together = firsts_s(port, prefix, [salt()] * REQUESTS)
    return cached, together, firsts_s(port, prefix, [salt() for _ in range(REQUESTS)])


def shared_rows(port: int, rounds: int) -> Iterator[list[str]]:
    found = [shared(port) for _ in range(rounds + 1)][1:]
    cached, together, without = (statistics.median(one) for one in zip(*found, strict=True))
    yield ["in the cache", f"{1000 * cached:.0f}", f"{without / cached:.1f}"]
    yield ["computed by the first of them", f"{1000 * together:.0f}", f"{without / together:.1f}"]
    yield ["without a cache", f"{1000 * without:.0f}", "1.0"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="keeps graphs between runs")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with home_folder(options.home) as home, servers(home, [{"no_speculate": True}]) as (server,):
        turns = list(chat_rows(server.port, options.rounds))
        both = list(shared_rows(server.port, options.rounds))
    columns = ["turn", "tokens before", "new", "first token, ms", "new ones alone, ms", "ratio"]
    record("prefix-chat", [*columns, "without a cache, ms"], turns)
    name = f"{REQUESTS} requests, prefix of {PREFIX}"
    record("prefix-shared", [name, "mean first token, ms", "times sooner"], both)


if __name__ == "__main__":
    main()
