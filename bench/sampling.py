"""What ways to draw cost a client: each beside greedy, taking turns at one server over HTTP.

    python -m bench sampling [--home PATH] [--rounds 3] [--streams 1,16] [--tp 1]

Prompts are random token ids, so that no two requests share any. The worker drafts nothing: with
drafts, greedy text that goes round would be faster for a reason that has nothing to do with
drawing. Tokens a second are of all streams behind their first tokens; ratios are medians of those
of each round, of the quickest tenth of all gaps too, which other load on the machine spares. What
the operator takes by itself: ``bench.sampling_operator``.
"""

import argparse
import asyncio
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from bench._stream_client import Streamed, burst
from bench._workers import MODEL, home_folder, servers
from bench.figures import record

Options = dict[str, Any]
GREEDY: Final[Options] = {"temperature": 0}
KINDS: Final[dict[str, Options]] = {
    "temperature 1": {"temperature": 1.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
    "top_k 50, top_p 0.9, min_p 0.05": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.05,
    },
    "all penalties, top_p 0.9": {
        "temperature": 1.0,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "300 biases, top_p 0.9": {
        "temperature": 1.0,
        "top_p": 0.9,
        "logit_bias": {str(token): -1 for token in range(500, 800)},
    },
    "top_p 0.9, log-probabilities": {"temperature": 1.0, "top_p": 0.9, "logprobs": 5},
}


def bodies(streams: int, tokens: int, options: Options) -> list[Options]:
    ask: Options = {"model": MODEL, "max_tokens": tokens, "ignore_eos": True, **options}
    return [
        {**ask, "prompt": [random.randrange(1000, 40_000) for _ in range(8)]}
        for _ in range(streams)
    ]


def decode_rate(found: Sequence[Streamed]) -> float:
    """Tokens a second from when all streams have their first to when the first one ends."""
    if wrong := next((one.error or "nothing" for one in found if one.error or not one.pieces), ""):
        raise SystemExit(f"a request failed: {wrong[:300]}")
    begun = max(one.pieces[0] for one in found)
    ended = min(one.pieces[-1] for one in found)
    tokens = sum(1 for one in found for at in one.pieces if begun < at <= ended)
    return tokens / (ended - begun)


def quick_gap_s(found: Sequence[Streamed]) -> float:
    """A tenth of all gaps between tokens are shorter: those in which nobody else had the cores."""
    gaps = sorted(gap for one in found for gap in one.gaps_s)
    return gaps[len(gaps) // 10]


def speed(port: int, streams: int, tokens: int, options: Options) -> tuple[float, float]:
    """Tokens a second, and what they would be if all gaps were quick ones."""
    found = asyncio.run(burst(port, bodies(streams, tokens, options)))
    return decode_rate(found), streams / quick_gap_s(found)


def rows(port: int, streams: int, options: argparse.Namespace) -> Iterator[list[str]]:
    speed(port, streams, options.tokens, GREEDY)
    for name, kind in KINDS.items():
        found = list[tuple[float, float]]()
        ratios = list[tuple[float, float]]()
        for number in range(options.rounds):
            order = (GREEDY, kind) if number % 2 else (kind, GREEDY)
            speeds = [speed(port, streams, options.tokens, one) for one in order]
            drawn, greedy = speeds[order.index(kind)], speeds[order.index(GREEDY)]
            found.append((drawn[0], greedy[0]))
            ratios.append((drawn[0] / greedy[0], drawn[1] / greedy[1]))
        speeds_shown = (f"{statistics.median(column):.0f}" for column in zip(*found, strict=True))
        medians = (f"{statistics.median(column):.3f}" for column in zip(*ratios, strict=True))
        row = [name, str(streams), *speeds_shown, *medians]
        print(", ".join(row), flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, help="keeps graphs between runs")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    options = parser.parse_args()
    found = list[list[str]]()
    with (
        home_folder(options.home) as home,
        servers(home, [{"no_speculate": True, "tp": options.tp}]) as (server,),
    ):
        for streams in map(int, options.streams.split(",")):
            found += rows(server.port, streams, options)
    headings = ["draw", "streams", "tokens/s", "greedy, tokens/s", "ratio", "of quick gaps"]
    record("sampling" if options.tp == 1 else f"sampling-tp{options.tp}", headings, found)


if __name__ == "__main__":
    main()
