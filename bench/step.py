"""Where the time of a served token goes: rank, leader, gateway, and the sockets between them.

    python -m bench step [--streams 1] [--tokens 200] [--trace trace.json] [--step-ms 8]
    python -m bench step --home ~/.precast --model smollm2

Starts Redis, a decode worker and a gateway whose functions are timed, and reads streamed
completions off plain sockets. Without ``--home`` the model is a tiny one with random weights; with
``--step-ms`` there is none, and a step takes that long. Steps run eagerly, for no compile worker is
there. The first table is a token's way, from the end of its step in the rank to its client; the
second is what each process does, without what it calls that has a line of its own. ``--trace``
writes all of it for chrome://tracing or Perfetto. Timing costs about a microsecond a line.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from bench._stream_client import burst
from precast.system.redis_server import start_redis
from tests.support.models import write_model
from tests.support.ports import free_port

ROLES = ("rank", "leader", "gateway")
READY_S = 120.0
WARM_TOKENS = 24
Span = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One run: what each process did while tokens came, and when those came (ns)."""

    spans: dict[str, list[Span]]
    pieces: list[int]
    tokens: int


@contextmanager
def service(role: str, folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """A traced service, which has written what it did at the end."""
    environment = {f"PRECAST_{name.upper()}": str(value) for name, value in settings.items()}
    environment["PRECAST_BENCH_TRACE"] = str(folder)
    with (folder / f"{role}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench._traced", role],
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def until_ready(port: int, folder: Path) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
    raise SystemExit(f"not ready within {READY_S:g} s\n{logs}")


async def ask(port: int, model: str, streams: int, tokens: int) -> tuple[list[int], int, int]:
    """When pieces came, and how many tokens they were; then when the second piece came."""
    body = {"model": model, "prompt": list(range(1, 9)), "temperature": 0, "ignore_eos": True}
    await burst(port, [{**body, "max_tokens": WARM_TOKENS}] * streams)
    found = await burst(port, [{**body, "max_tokens": tokens}] * streams)
    if wrong := [one.error for one in found if one.error or len(one.pieces) < 3]:
        raise SystemExit(f"a request failed: {wrong[0][:300]}")
    pieces = sorted(int(at * 1e9) for one in found for at in one.pieces)
    begun = max(int(one.pieces[1] * 1e9) for one in found)
    return pieces, begun, sum(one.tokens for one in found)


def run(options: argparse.Namespace, folder: Path) -> Traced:
    home = options.home or folder
    if options.home is None:
        write_model(home / "models" / options.model)
    port = free_port()
    common = {"home": home, "log_level": "warning"}
    worker = {"model": options.model, "listen": f"127.0.0.1:{free_port()}", "metrics_port": 0}
    if options.step_ms is not None:
        os.environ["PRECAST_BENCH_RANK"] = "tests.support.simulated_rank"
        os.environ["PRECAST_SIMULATED_STEP_MS"] = str(options.step_ms)
    with ExitStack() as stack:
        redis = stack.enter_context(start_redis(folder / "redis"))
        common["redis_url"] = redis.url
        stack.enter_context(service("leader", folder, {**common, **worker}))
        ports = {"port": port, "metrics_port": 0}
        stack.enter_context(service("gateway", folder, {**common, **ports}))
        until_ready(port, folder)
        pieces, begun, tokens = asyncio.run(
            ask(port, options.model, options.streams, options.tokens)
        )
    kept = [at for at in pieces if at >= begun]
    spans = {role: within(read(folder, role), begun, kept[-1]) for role in ROLES}
    return Traced(spans=spans, pieces=kept, tokens=round(tokens * len(kept) / len(pieces)))


def read(folder: Path, role: str) -> list[Span]:
    found = [json.loads(path.read_text()) for path in folder.glob(f"{role}-*.json")]
    return sorted((tuple(span) for spans in found for span in spans), key=lambda span: span[1])


def within(spans: Sequence[Span], begun: int, ended: int) -> list[Span]:
    return [span for span in spans if begun <= span[1] and span[2] <= ended]


def own_ns(spans: Sequence[Span]) -> dict[str, int]:
    """Time in each name, without spans inside of it."""
    found, open_spans = defaultdict[str, int](int), list[Span]()
    for span in spans:  # by their beginning: one that is inside of another comes after it
        while open_spans and open_spans[-1][2] <= span[1]:
            open_spans.pop()
        if open_spans and span[2] <= open_spans[-1][2]:
            found[open_spans[-1][0]] -= span[2] - span[1]
        found[span[0]] += span[2] - span[1]
        open_spans.append(span)
    return found


def ways(traced: Traced) -> dict[str, list[float]]:
    """Of each step, microseconds from the end of its computation to the first client."""
    stations = (
        (
            "step over, answer at the leader (socket, wake-up)",
            moments(traced, "leader", "turn", ended=False),
        ),
        (
            "leader, until the gateway's message is sent",
            moments(traced, "leader", "message to", ended=True),
        ),
        (
            "message at the gateway (socket, wake-up)",
            moments(traced, "gateway", "turn", ended=False),
        ),
        (
            "gateway, until the event is at the socket",
            moments(traced, "gateway", "HTTP to", ended=True),
        ),
        ("event at the client (socket, wake-up)", traced.pieces),
    )
    found = defaultdict[str, list[float]](list)
    for over in moments(traced, "rank", "step", ended=True):
        at, legs = over, list[tuple[str, float]]()
        for name, times in stations:
            place = bisect_left(times, at)
            if place == len(times):
                break
            legs.append((name, us(at, times[place])))
            at = times[place]
        else:
            for name, leg in legs:
                found[name].append(leg)
    return found


def moments(traced: Traced, role: str, name: str, *, ended: bool) -> list[int]:
    """When spans whose names begin so have begun, or ended."""
    return sorted(
        span[2] if ended else span[1] for span in traced.spans[role] if span[0].startswith(name)
    )


def us(begun: int, ended: int) -> float:
    return (ended - begun) / 1e3


def chrome(traced: Traced) -> dict[str, Any]:
    """The run as Chrome's tracing takes it; times in microseconds."""
    first = min((spans[0][1] for spans in traced.spans.values() if spans), default=0)
    names = [
        {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": role}}
        for pid, role in enumerate((*ROLES, "client"), 1)
    ]
    events = [
        {"ph": "X", "name": name, "pid": pid, "tid": 1, "ts": us(first, a), "dur": us(a, b)}
        for pid, role in enumerate(ROLES, 1)
        for name, a, b in traced.spans[role]
    ]
    client = len(ROLES) + 1
    pieces = [
        {"ph": "i", "name": "event", "pid": client, "tid": 1, "s": "t", "ts": us(first, at)}
        for at in traced.pieces
    ]
    return {"traceEvents": [*names, *events, *pieces]}


def way_table(traced: Traced) -> Table:
    table = Table("a token's way", "p50 us", "p90 us", title="from its step to its client")
    for name, legs in ways(traced).items():
        ordered = sorted(legs)
        p90 = ordered[int(len(ordered) * 0.9)]
        table.add_row(name, f"{statistics.median(ordered):.0f}", f"{p90:.0f}")
    return table


def work_table(traced: Traced) -> Table:
    table = Table("process", "doing", "us a token", title="what it takes (elapsed time)")
    for role in ROLES:
        for name, spent in sorted(own_ns(traced.spans[role]).items(), key=lambda one: -one[1]):
            table.add_row(role, name, f"{spent / 1e3 / traced.tokens:.1f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200, help="of each stream")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace here")
    parser.add_argument("--step-ms", type=float, help="no model: a step takes so long")
    parser.add_argument("--home", type=Path, help="a folder of precast's with the model in it")
    parser.add_argument("--model", default="tiny")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        traced = run(options, Path(name))
    console = Console(width=100)
    console.print(way_table(traced))
    console.print(work_table(traced))
    if options.trace:
        options.trace.write_text(json.dumps(chrome(traced)))
        console.print(f"wrote {options.trace}")


if __name__ == "__main__":
    main()
