"""What a client gets over HTTP: Precast beside llama-server, on the same cores, taking turns.

    python -m bench.served --llama-server build/bin/llama-server --gguf model-q4_0.gguf

Starts ``precast serve`` on the demo model and llama-server on the same model, waits until Precast
has its graphs, and sends both the same requests in alternating rounds; the one that waits is idle.
Server and client share the cores, as they do on a small machine. Prompts are random token ids, so
that no round meets what another left in a cache, except where a prompt is sent again on purpose.
Without ``--llama-server`` only Precast is measured. Medians of the rounds; ratios are of these.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench._stream_client import Streamed, burst, stream
from bench.figures import record
from tests.support.ports import free_port
from tests.support.serve_stack import MODEL, serving

READY_S = 900.0
SLOTS = 16
CONTEXT = 8192
GREEDY: dict[str, Any] = {"temperature": 0}
DRAWN: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7}


@dataclass(frozen=True, kw_only=True)
class Load:
    """Streams that run at once, as one row of the table."""

    name: str
    streams: int
    prompt: int
    """Tokens of each prompt."""
    output: int
    sampling: dict[str, Any]


LOADS = (
    *(
        Load(name=f"{n} streams, 128 in 64 out", streams=n, prompt=128, output=64, sampling=GREEDY)
        for n in (1, 4, 16, 32)
    ),
    Load(name="16 streams, 8 in 96 out", streams=16, prompt=8, output=96, sampling=GREEDY),
    Load(name="the same, top_p 0.9", streams=16, prompt=8, output=96, sampling=DRAWN),
    Load(name="1 stream, 8 in 96 out, top_p 0.9", streams=1, prompt=8, output=96, sampling=DRAWN),
)
LONG = (500, 2000, 4000, 8000)
"""Prompts of one request alone."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One round of a load at one server."""

    tokens_per_s: float
    gap_p50_ms: float
    gap_p99_ms: float
    first_ms: float


def prompt(tokens: int) -> list[int]:
    return [random.randrange(1000, 40_000) for _ in range(tokens)]


def body(prompt_ids: Sequence[int], output: int, sampling: dict[str, Any]) -> dict[str, Any]:
    ask = {"model": MODEL, "prompt": list(prompt_ids), "max_tokens": output, "ignore_eos": True}
    return ask | sampling


def checked(found: Sequence[Streamed]) -> Sequence[Streamed]:
    wrong = next((one.error or "no token" for one in found if one.error or not one.pieces), "")
    if wrong:
        raise SystemExit(f"a request failed: {wrong[:300]}")
    return found


async def run(port: int, load: Load) -> Measured:
    bodies = [body(prompt(load.prompt), load.output, load.sampling) for _ in range(load.streams)]
    begun = time.monotonic()
    found = checked(await burst(port, bodies))
    elapsed = time.monotonic() - begun
    gaps = sorted(gap for one in found for gap in one.gaps_s)
    return Measured(
        tokens_per_s=sum(one.tokens for one in found) / elapsed,
        gap_p50_ms=1000 * gaps[len(gaps) // 2],
        gap_p99_ms=1000 * gaps[int(len(gaps) * 0.99)],
        first_ms=1000 * statistics.median(one.first_s for one in found),
    )


async def again(port: int) -> float:
    """Seconds to the first token of a 7,000-token prompt that was sent before."""
    ids = prompt(7000)
    checked([await stream(port, body(ids, 8, GREEDY))])
    return checked([await stream(port, body(ids, 64, GREEDY))])[0].first_s


async def behind(port: int) -> float:
    """Seconds to the first token of a short prompt sent 0.3 s after one of 4,000 tokens."""
    long = asyncio.create_task(stream(port, body(prompt(4000), 8, GREEDY)))
    await asyncio.sleep(0.3)
    short = await stream(port, body(prompt(8), 8, GREEDY))
    checked([short, await long])
    return short.first_s


async def alone(port: int, tokens: int) -> float:
    """Seconds to the first token of one long prompt."""
    return checked([await stream(port, body(prompt(tokens), 1, GREEDY))])[0].first_s


@contextmanager
def precast(home: Path, flags: Sequence[str]) -> Iterator[int]:
    """A stack whose graphs are there; its port."""
    with serving(home, *flags) as stack:
        stack.wait_line("Precast serves", READY_S)
        stack.wait_line("every step replays a graph", READY_S)
        yield stack.port


@contextmanager
def llama_server(program: Path, model: Path, threads: int) -> Iterator[int]:
    port = free_port()
    command = [program, "-m", model, "--port", port, "-np", SLOTS, "-c", CONTEXT * SLOTS]
    command += ["-t", threads, "-tb", threads, "-fa", "on", "--no-warmup", "--no-webui"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        try:
            _until_healthy(port, process)
            yield port
        finally:
            process.terminate()
            process.wait(30)


def _until_healthy(port: int, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("llama-server did not start")


def in_turn(ports: Sequence[int], rounds: int, once: Callable[[int], Any]) -> list[list[Any]]:
    """What each server measured, round by round; one round before warms up."""
    found: list[list[Any]] = [[] for _ in ports]
    for number in range(rounds + 1):
        for server, port in enumerate(ports):
            measured = asyncio.run(once(port))
            if number:
                found[server].append(measured)
    return found


def load_rows(ports: Sequence[int], rounds: int, loads: Sequence[Load]) -> Iterator[list[str]]:
    for load in loads:
        found = in_turn(ports, rounds, partial(run, load=load))
        speeds = [statistics.median(m.tokens_per_s for m in one) for one in found]
        print(f"{load.name}: {' : '.join(f'{speed:.0f}' for speed in speeds)} tokens/s", flush=True)
        yield [
            load.name,
            *(f"{speed:.0f}" for speed in speeds),
            *([f"{speeds[0] / speeds[1]:.2f}"] if len(speeds) > 1 else []),
            *(
                " / ".join(
                    f"{statistics.median(getattr(m, name) for m in one):.0f}"
                    for name in ("gap_p50_ms", "gap_p99_ms", "first_ms")
                )
                for one in found
            ),
        ]


def wait_rows(ports: Sequence[int], rounds: int, long: Sequence[int]) -> Iterator[list[str]]:
    trials: list[tuple[str, Callable[[int], Any]]] = [
        (f"{tokens}-token prompt", partial(alone, tokens=tokens)) for tokens in long
    ]
    trials += [("7,000-token prompt, again", again), ("short behind 4,000 tokens", behind)]
    for name, once in trials:
        seconds = [statistics.median(one) for one in in_turn(ports, rounds, once)]
        print(f"{name}: {' : '.join(f'{one:.2f}' for one in seconds)} s", flush=True)
        ratio = [f"{seconds[1] / seconds[0]:.2f}"] if len(seconds) > 1 else []
        yield [name, *(f"{one:.2f}" for one in seconds), *ratio]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", type=Path, help="the peer's program")
    parser.add_argument("--gguf", type=Path, help="the model that the peer serves")
    parser.add_argument("--home", type=Path, help="Precast's folder; keeps graphs between runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the peer")
    parser.add_argument("--no-waits", action="store_true", help="leave out the long prompts")
    parser.add_argument("--quick", action="store_true", help="one short load, for a check in CI")
    parser.add_argument("flags", nargs="*", help="more for precast serve, after --")
    arguments = parser.parse_args()
    if arguments.llama_server and not arguments.gguf:
        parser.error("--llama-server needs --gguf")
    loads = LOADS[:1] if arguments.quick else LOADS
    peer = (
        llama_server(arguments.llama_server, arguments.gguf, arguments.threads)
        if arguments.llama_server
        else nullcontext(0)
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        precast(arguments.home or Path(scratch), arguments.flags) as port,
        peer as other,
    ):
        ports = [port, other] if other else [port]
        names = ["Precast", "llama-server"][: len(ports)]
        ratio = ["ratio"] if other else []
        speeds = list(load_rows(ports, arguments.rounds, loads))
        times = [f"{name}: gap p50 / p99, first token, ms" for name in names]
        waits = (
            []
            if arguments.quick or arguments.no_waits
            else list(wait_rows(ports, arguments.rounds, LONG))
        )
    columns = ["load", *(f"{name}, tokens/s" for name in names), *ratio, *times]
    record("served" if other else "served-alone", columns, speeds)
    if waits:
        columns = ["first token after", *(f"{name}, s" for name in names), *ratio]
        record("waits" if other else "waits-alone", columns, waits)


if __name__ == "__main__":
    main()
