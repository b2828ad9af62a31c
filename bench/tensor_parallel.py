"""Two ranks of one thread against one rank of two threads: decode steps end to end, alternating.

    python -m bench.tensor_parallel [--quantization q4_1,int8] [--widths 1,4,16] [--graphs FOLDER]

Both groups are a decode worker's rank processes on the same two cores, with the demo model and
captured graphs; one waits while the other works. A step's time is its leader's: from sending the
command to the sampled tokens. Prints medians, and tokens a second of two ranks by those of one.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.decode_step import BLOCK_SIZE, capture_factors
from bench.llama_1b import precision_of
from precast.models.importing.importer import import_model
from precast.models.precision import Quantization
from precast.ops import native
from precast.system.process import available_cpus
from precast.system.shared_memory import new_segment_name
from services.decode_worker.ranks.group import RankGroup
from services.decode_worker.ranks.kv_memory import KvMemory
from services.decode_worker.ranks.launcher import RankLauncher
from services.decode_worker.ranks.protocol import Init, LoadGraph, Step

MODEL = "smollm2-135m-instruct"
CONTEXT = 128
STEPS = 24
ROUNDS = 8
TIMEOUT_S = 60.0
BLOCKS_A_ROW = -(-(CONTEXT + 1) // BLOCK_SIZE)
Layout = tuple[tuple[int, ...], ...]
"""Cores of each rank."""


def inits(
    layout: Layout, folder: Path, packed: Path, quantization: Quantization, width: int
) -> list[Init]:
    group = new_segment_name()
    precision = precision_of(quantization)
    return [
        Init(
            model_dir=str(folder),
            packed_dir=str(packed),
            precision=precision,
            tp_rank=rank,
            tp_size=len(layout),
            cores=cores,
            kv_blocks=width * BLOCKS_A_ROW,
            block_size=BLOCK_SIZE,
            max_batch_size=width,
            max_context_length=1024,
            group_id=group,
            kernel_provider="native",
        )
        for rank, cores in enumerate(layout)
    ]


async def load_graphs(group: RankGroup, widths: list[int], graphs: Path, name: str) -> None:
    for width in widths:
        paths = [
            await asyncio.to_thread(
                capture_factors, ready.graph_factors, width, graphs / f"{name}-rank{rank}-{width}"
            )
            for rank, ready in enumerate(group.ready)
        ]
        answers = await group.load_graph(
            LoadGraph(
                num_tokens=width,
                paths=tuple(map(str, paths)),
                keys=("",) * len(paths),
                versions=(1,) * len(paths),
            )
        )
        assert all(answer.error is None for answer in answers), answers


def step(step_id: int, width: int) -> Step:
    """Each sequence's token behind CONTEXT others."""

    def ints(values: object) -> bytes:
        return np.asarray(values, dtype=np.int32).tobytes()

    tables = np.arange(width * BLOCKS_A_ROW).reshape(width, -1)
    return Step(
        step_id=step_id,
        graph_size=width,
        token_ids=ints(np.arange(width) + 100),
        positions=ints(np.full(width, CONTEXT)),
        slots=ints(tables[:, CONTEXT // BLOCK_SIZE] * BLOCK_SIZE + CONTEXT % BLOCK_SIZE),
        query_starts=ints(np.arange(width + 1)),
        context_lens=ints(np.full(width, CONTEXT + 1)),
        block_tables=ints(tables),
        block_table_width=BLOCKS_A_ROW,
        sampling_slots=ints(np.zeros(width)),
        draws=ints(np.ones(width)),
        drawn=ints(np.zeros(width)),
        greedy=True,
    )


async def run(group: RankGroup, ids: "count[int]", width: int) -> list[float]:
    times = []
    for _ in range(STEPS):
        command = step(next(ids), width)
        started = time.perf_counter()
        group.send_step(command, timeout_s=TIMEOUT_S)
        await group.step_done()
        times.append(time.perf_counter() - started)
    return times


async def compare(groups: list[RankGroup], ids: "count[int]", width: int) -> list[float]:
    """Median seconds of a step of each group, called in turn."""
    samples: list[list[float]] = [[] for _ in groups]
    for round_ in range(ROUNDS + 1):
        for group, seconds in zip(groups, samples, strict=True):
            times = await run(group, ids, width)
            if round_ > 0:  # the first warms up
                seconds += times
    return [statistics.median(seconds) for seconds in samples]


async def measure(arguments: argparse.Namespace, folder: Path, scratch: Path, table: Table) -> None:
    first, second = available_cpus()[:2]
    layouts: dict[str, Layout] = {"tp1": ((first, second),), "tp2": ((first,), (second,))}
    widths = [int(width) for width in arguments.widths.split(",")]
    for quantization in arguments.quantization.split(","):
        groups = []
        for name, layout in layouts.items():
            group = await RankGroup.start(
                inits(layout, folder, scratch / "packed", quantization, max(widths)),
                RankLauncher(),
                KvMemory(len(layout)),
            )
            groups.append(group)
            graphs = arguments.graphs or scratch / "graphs"
            await load_graphs(group, widths, graphs, f"{quantization}-{name}")
        ids = count()
        for width in widths:
            one, two = await compare(groups, ids, width)
            cells = (f"{one * 1e3:.2f}", f"{two * 1e3:.2f}", f"{one / two:.2f}")
            table.add_row(quantization, str(width), *cells)
        for group in groups:
            await group.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quantization", default="q4_1,int8")
    parser.add_argument("--widths", default="1,4,16")
    parser.add_argument("--graphs", type=Path, help="keep captured graphs here")
    parser.add_argument("--home", type=Path, default=Path(".precast"))
    arguments = parser.parse_args()
    if len(available_cpus()) < 2:
        raise SystemExit("two cores are needed")
    table = Table("weights", "batch", "1 rank x 2 ms", "2 ranks x 1 ms", "two by one")
    with tempfile.TemporaryDirectory() as scratch:
        folder = import_model(MODEL, arguments.home / "models", report=print).path
        asyncio.run(measure(arguments, folder, Path(scratch), table))
    Console().print(f"SmolLM2-135M, contexts of {CONTEXT}, {native.native_isa()}")
    Console().print(table)


if __name__ == "__main__":
    main()
