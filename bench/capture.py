"""How long graphs take to capture, and how much memory, as a compile worker's users see it.

    python -m bench.capture [--models smollm2,llama-1b] [--sizes 1,2,4] [--further 6] [--parallel 1]

Starts a compile worker with nothing kept of earlier ones, asks for the whole default set at once,
then for a further size, and prints seconds of wall time from the request to the publication.
Memory is the peak of the worker and all its processes, sampled: "resident" counts a page that forks
share once for each, "proportional" once in all.
"""

import argparse
import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bench.decode_step import BLOCK_SIZE, smollm2
from bench.llama_1b import CONFIG
from precast.graphs.factors import rank_factors
from precast.models.layers import Shape
from precast.models.options import LlamaOptions
from precast.models.shape import ModelShape
from precast.proto.graphs.v1 import graphs_service_pb2 as pb
from precast.system.redis_server import start_redis
from tests.support.compile_worker import compile_worker, connect

SIZES: Final = "1,2,4,8,12,16,24,32,64,256"
"""The default set: decode batches, and buckets of 16, 64 and 256 tokens."""
DEADLINE_S: Final = 900.0
_SAMPLE_S: Final = 0.05


def llama_1b() -> Shape:
    """Llama 3.2 1B's."""
    kv_heads = CONFIG["num_key_value_heads"]
    return ModelShape(
        architecture="llama",
        hidden_size=CONFIG["hidden_size"],
        query_groups=(CONFIG["num_attention_heads"] // kv_heads,) * kv_heads,
        head_dim=CONFIG["head_dim"],
        intermediate_size=CONFIG["intermediate_size"],
        vocab_widths=(CONFIG["vocab_size"],),
        vocab_size=CONFIG["vocab_size"],
        rms_norm_eps=CONFIG["rms_norm_eps"],
        options=LlamaOptions(),
        weight_dtype="fp32",
        quantization="q4_1",
        head_quantization="q4_1",
        kv_dtype="fp32",
    )


MODELS: Final[dict[str, tuple[str, int, Callable[[], Shape]]]] = {
    "smollm2": ("SmolLM2-135M", 30, lambda: smollm2("q4_1")),
    "llama-1b": ("Llama 3.2 1B", 16, llama_1b),
}
"""Names, layers and shapes."""


@dataclass
class Peak:
    """MB."""

    resident: float = 0.0
    proportional: float = 0.0
    processes: int = 0


@contextmanager
def watched(pid: int) -> Iterator[Peak]:
    """Samples a process tree meanwhile."""
    peak, stop = Peak(), threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            with suppress(psutil.Error):
                root = psutil.Process(pid)
                _add_sample(peak, [root, *root.children(recursive=True)])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _add_sample(peak: Peak, processes: Sequence[psutil.Process]) -> None:
    resident = proportional = 0
    for process in processes:
        with suppress(psutil.Error, OSError):
            resident += process.memory_info().rss
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            line = next(line for line in rollup.splitlines() if line.startswith("Pss:"))
            proportional += int(line.split()[1]) << 10
    peak.resident = max(peak.resident, resident / 2**20)
    peak.proportional = max(peak.proportional, proportional / 2**20)
    peak.processes = max(peak.processes, len(processes))


@dataclass(frozen=True, kw_only=True)
class Found:
    cold_s: float
    further_s: float
    peak: Peak


async def measure(shape: Shape, sizes: Sequence[int], further: int, parallel: int) -> Found:
    factors = rank_factors(shape, block_size=BLOCK_SIZE, torch_version=str(torch.__version__))
    with (
        tempfile.TemporaryDirectory() as scratch,
        start_redis(Path(scratch) / "redis") as redis,
        compile_worker(
            Path(scratch) / "home",
            redis.url,
            build_dir=str(Path(scratch) / "build"),
            parallel_captures=parallel,
        ) as worker,
    ):
        async with connect(worker) as client:

            async def captured(*wanted: int) -> float:
                started = time.perf_counter()
                specs = [{**factors, "num_tokens": str(size)} for size in wanted]
                keys = [state.key for state in await client.request(*specs)]
                over = (pb.GRAPH_PHASE_PUBLISHED, pb.GRAPH_PHASE_FAILED)
                states = await client.until(keys, *over, deadline_s=DEADLINE_S)
                seconds = time.perf_counter() - started
                errors = [state.error for state in states.values() if state.error]
                if errors:
                    raise RuntimeError(errors[0])
                return seconds

            with watched(worker.process.pid) as peak:
                cold_s = await captured(*sizes)
                further_s = await captured(further)
    return Found(cold_s=cold_s, further_s=further_s, peak=peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--further", type=int, default=6)
    parser.add_argument("--parallel", type=int, default=1, help="captures at a time")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    table = Table("model", "layers", f"cold, {len(sizes)} sizes, s", "further size, s", "peak MB")
    for name in arguments.models.split(","):
        title, layers, shape = MODELS[name]
        found = asyncio.run(measure(shape(), sizes, arguments.further, arguments.parallel))
        peak = found.peak
        table.add_row(
            title,
            str(layers),
            f"{found.cold_s:.1f}",
            f"{found.further_s:.1f}",
            f"{peak.resident:.0f} resident, {peak.proportional:.0f} proportional",
        )
    console = Console(width=100)
    console.print(
        f"q4_1, {arguments.parallel} at a time, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    console.print(table)


if __name__ == "__main__":
    main()
