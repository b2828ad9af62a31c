"""From process start to first token with warm artifacts, and what a loaded graph costs.

    python -m bench.cold_start [--rounds 5]

Captures SmolLM2-135M's graphs first if the home folder lacks them, then starts the decode worker
again and again. Prints medians; loading times and resident memory are of the rank that loads them.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.decode_step import BLOCK_SIZE, LAYERS, capture, smollm2
from precast.graphs.capture import export
from precast.graphs.runner import Graph
from precast.models.importing.importer import import_model
from precast.models.load import random_weights
from precast.system.redis_server import start_redis
from tests.support.compile_worker import compile_worker
from tests.support.decode_worker import decode_worker

MODEL = "smollm2-135m-instruct"
SIZES = (1, 2, 4, 8, 16)
PROMPT = [1, 504, 3575, 282, 4649, 314]


def first_token(home: Path, redis_url: str) -> tuple[float, float]:
    """Seconds from process start to readiness with every graph loaded, and to the first token."""
    start = time.perf_counter()
    with decode_worker(
        home,
        redis_url,
        MODEL,
        quantization="int8",
        batch_sizes=",".join(map(str, SIZES)),
        max_context_length=1024,
        wait_for_graphs=True,
        ready_s=1200,
        environment={},  # a process of its own, which imports what it needs
    ) as worker:
        ready = time.perf_counter() - start
        client = worker.client()
        client.start("first", worker.request(PROMPT, 2))
        client.next("first")
        token = time.perf_counter() - start
        client.finish("first")
        assert worker.status().eager_steps == 0
    return ready, token


def load_costs(folder: Path) -> list[tuple[int, float, float]]:
    """For each size: milliseconds to load it and the MB of memory that it adds, replay included."""
    shape = smollm2("int8")
    generator = torch.Generator().manual_seed(0)
    plan = export.verification_plan(shape, LAYERS)
    weights = random_weights(shape, plan, export.CAPTURE_POSITIONS, generator)
    caches = [export.random_cache(shape, BLOCK_SIZE, generator) for _ in range(LAYERS)]
    rows, graphs = [], []
    for size in SIZES:
        package = capture(shape, size, folder)
        inputs = export.decode_inputs(shape, BLOCK_SIZE, [64] * size, generator)
        export.eager_step(shape, inputs, weights, caches)
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        graph = Graph(package, size, shape, weights, caches)
        load_ms = (time.perf_counter() - start) * 1e3
        graph.replay(inputs.token_ids, inputs.positions, inputs.paging)
        rows.append((size, load_ms, (psutil.Process().memory_info().rss - before) / 2**20))
        graphs.append(graph)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--graphs", type=Path, help="keep captured graphs here")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = arguments.graphs or scratch / "graphs"
        home = scratch / "home"
        kept = os.environ.get("PRECAST_HOME") or Path(__file__).parents[1] / ".precast"
        model = import_model(MODEL, Path(kept) / "models", report=print).path
        (home / "models").mkdir(parents=True)
        (home / "models" / MODEL).symlink_to(model)
        redis_url = stack.enter_context(start_redis(home / "redis")).url
        with compile_worker(home, redis_url):
            first_token(home, redis_url)  # captures
        starts = [first_token(home, redis_url) for _ in range(arguments.rounds)]
        with torch.inference_mode():
            costs = load_costs(folder)
    table = Table("graph", "load ms", "adds MB")
    for size, load_ms, megabytes in costs:
        table.add_row(f"batch {size}", f"{load_ms:.1f}", f"{megabytes:.1f}")
    console = Console()
    console.print(table)
    ready, token = (statistics.median(values) for values in zip(*starts, strict=True))
    console.print(
        f"process start to {len(SIZES)} graphs loaded {ready:.2f} s, to first token {token:.2f} s "
        f"(medians of {len(starts)})"
    )


if __name__ == "__main__":
    if not (Path.cwd() / "tests" / "support").is_dir():
        sys.exit("run it from the clone's root")
    main()
