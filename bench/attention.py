"""Attention alone: of decode steps, against what the memory gives, and of prefill chunks, against
the multiply-add units.

    python -m bench.attention [--batch-sizes 1,16] [--contexts 128] [--kv-dtypes bf16] [--threads 1]
                              [--chunk 256] [--prefill-contexts 512,2048,8192]

SmolLM2-135M's heads (nine queries, three keys and values of 64). Each timed run of a decode step
goes over the caches of as many layers as together exceed the processor's, as a model does. A chunk
is the last one of its context. The peak is of independent multiply-adds in registers
(fma_peak.cpp), measured in turn with the chunks, on as many threads. Prints medians.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.decode_step import BLOCK_SIZE, read_bandwidth, smollm2
from precast.graphs.capture.export import Span, random_cache, step_inputs
from precast.models.precision import KvDtype
from precast.ops import native
from precast.ops.build import COMMON_FLAGS, ISA_FLAGS, compiler
from precast.system.process import available_cpus

WORKING_SET = 128 << 20
ROUNDS = 15
SHAPE = smollm2("q4_0")


def attention_run(
    batch: int, context: int, kv_dtype: KvDtype, *, new: int = 1, working_set: int = WORKING_SET
) -> tuple[Callable[[], None], int, int]:
    """A pass over all layers' caches, their number, and the bytes of keys and values in one.
    ``new``: tokens of each sequence that attend."""
    generator = torch.Generator().manual_seed(0)
    blocks = batch * -(-context // BLOCK_SIZE)
    spans = [Span(new=new, context=context)] * batch
    paging = step_inputs(SHAPE, BLOCK_SIZE, spans, generator, blocks).paging
    shape = replace(SHAPE, kv_dtype=kv_dtype)
    caches = [random_cache(shape, BLOCK_SIZE, generator, blocks)]
    size = (caches[0].k.nbytes + caches[0].v.nbytes) * context // (blocks // batch * BLOCK_SIZE)
    while len(caches) * size < working_set:
        caches.append(random_cache(shape, BLOCK_SIZE, generator, blocks))
    q = torch.randn(batch * new, SHAPE.q_heads, SHAPE.head_dim, generator=generator)
    k, v = torch.randn(2, batch * new, SHAPE.kv_heads, SHAPE.head_dim, generator=generator)

    def run() -> None:
        for cache in caches:
            torch.ops.precast.paged_attention(
                q, k, v, cache.k, cache.v, *paging, SHAPE.head_dim**-0.5, 0, 0.0
            )

    return run, len(caches), size


def timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_time(run: Callable[[], None]) -> float:
    return statistics.median([timed(run) for _ in range(ROUNDS + 1)][1:])


def operations(chunk: int, context: int) -> int:
    """Multiplications and additions of a chunk's attention: scores, then values."""
    pairs = sum(range(context - chunk + 1, context + 1))
    return 4 * SHAPE.head_dim * SHAPE.q_heads * pairs


def peak_program(folder: Path) -> Path:
    """fma_peak.cpp, built for the instruction set in use. Raises CalledProcessError."""
    target = folder / "fma_peak"
    flags = [*COMMON_FLAGS, "-O2", *ISA_FLAGS[native.native_isa()], "-pthread"]
    source = Path(__file__).with_name("fma_peak.cpp")
    subprocess.run([compiler(), *flags, str(source), "-o", str(target)], check=True)
    return target


def peak(program: Path, cores: Sequence[int]) -> float:
    """Multiplications and additions a second of all threads together."""
    command = [str(program), *map(str, cores)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return float(run.stdout)


def decode_table(
    batches: Sequence[int], contexts: Sequence[int], kv_dtypes: Sequence[KvDtype], bandwidth: float
) -> Table:
    table = Table("KV cache", "batch", "context", "GB/s", "of read", "us a layer")
    for kv_dtype in kv_dtypes:
        for batch in batches:
            for context in contexts:
                run, layers, size = attention_run(batch, context, kv_dtype)
                rate = layers * size / median_time(run)
                table.add_row(
                    kv_dtype,
                    str(batch),
                    str(context),
                    f"{rate / 1e9:.1f}",
                    f"{rate / bandwidth:.0%}",
                    f"{size / rate * 1e6:.0f}",
                )
        table.add_section()
    return table


def prefill_table(
    chunk: int, contexts: Sequence[int], kv_dtypes: Sequence[KvDtype], cores: Sequence[int]
) -> Table:
    table = Table("KV cache", "chunk", "context", "GFLOP/s", "of peak", "ms a layer")
    with tempfile.TemporaryDirectory() as folder:
        program = peak_program(Path(folder))
        for kv_dtype in kv_dtypes:
            for context in contexts:
                run, _, _ = attention_run(1, context, kv_dtype, new=chunk, working_set=0)
                seconds, most = median_time(run), peak(program, cores)
                rate = operations(chunk, context) / seconds
                table.add_row(
                    kv_dtype,
                    str(chunk),
                    str(context),
                    f"{rate / 1e9:.1f}",
                    f"{rate / most:.0%}",
                    f"{seconds * 1e3:.2f}",
                )
            table.add_section()
    return table


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", type=integers, default=[1, 16, 32])
    parser.add_argument("--contexts", type=integers, default=[128, 1024])
    parser.add_argument("--kv-dtypes", default="fp32,bf16,int8")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--prefill-contexts", type=integers, default=[512, 2048, 8192])
    arguments = parser.parse_args()
    kv_dtypes = arguments.kv_dtypes.split(",")
    cores = available_cpus()[: arguments.threads or None]
    native.start_threads(cores)
    bandwidth = read_bandwidth()
    console = Console()
    console.print(
        f"{len(cores)} threads, {native.native_isa()}, memory read {bandwidth / 1e9:.1f} GB/s"
    )
    with torch.inference_mode():
        console.print(decode_table(arguments.batch_sizes, arguments.contexts, kv_dtypes, bandwidth))
        console.print(prefill_table(arguments.chunk, arguments.prefill_contexts, kv_dtypes, cores))


if __name__ == "__main__":
    main()
