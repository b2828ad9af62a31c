"""Attention of a decode step alone: keys and values read a second, against what the memory gives.

    python -m bench.attention [--batch-sizes 1,16] [--contexts 128] [--kv-dtypes bf16]

SmolLM2-135M's heads (nine queries, three keys and values of 64). Each timed run goes over the
caches of as many layers as together exceed the processor's, as a model does. Prints medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from bench.decode_step import BLOCK_SIZE, read_bandwidth, smollm2
from precast.graphs.capture.export import Span, random_cache, step_inputs
from precast.models.precision import KvDtype
from precast.ops import native
from precast.system.process import available_cpus

WORKING_SET = 128 << 20
ROUNDS = 15
SHAPE = smollm2("q4_0")


def attention_run(
    batch: int, context: int, kv_dtype: KvDtype
) -> tuple[Callable[[], None], int, int]:
    """A pass over all layers' caches, their number, and the bytes of keys and values in one."""
    generator = torch.Generator().manual_seed(0)
    blocks = batch * -(-context // BLOCK_SIZE)
    spans = [Span(new=1, context=context)] * batch
    paging = step_inputs(SHAPE, BLOCK_SIZE, spans, generator, blocks).paging
    shape = replace(SHAPE, kv_dtype=kv_dtype)
    caches = [random_cache(shape, BLOCK_SIZE, generator, blocks)]
    size = (caches[0].k.nbytes + caches[0].v.nbytes) * context // (blocks // batch * BLOCK_SIZE)
    while len(caches) * size < WORKING_SET:
        caches.append(random_cache(shape, BLOCK_SIZE, generator, blocks))
    q = torch.randn(batch, SHAPE.q_heads, SHAPE.head_dim, generator=generator)
    k, v = torch.randn(2, batch, SHAPE.kv_heads, SHAPE.head_dim, generator=generator)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch-sizes", default="1,16,32")
    parser.add_argument("--contexts", default="128,1024")
    parser.add_argument("--kv-dtypes", default="fp32,bf16,int8")
    arguments = parser.parse_args()
    cores = available_cpus()
    native.start_threads(cores)
    bandwidth = read_bandwidth()
    table = Table("KV cache", "batch", "context", "GB/s", "of read", "us a layer")
    with torch.inference_mode():
        for kv_dtype in arguments.kv_dtypes.split(","):
            for batch in map(int, arguments.batch_sizes.split(",")):
                for context in map(int, arguments.contexts.split(",")):
                    run, layers, size = attention_run(batch, context, kv_dtype)
                    samples = [timed(run) for _ in range(ROUNDS + 1)][1:]
                    rate = layers * size / statistics.median(samples)
                    table.add_row(
                        kv_dtype,
                        str(batch),
                        str(context),
                        f"{rate / 1e9:.1f}",
                        f"{rate / bandwidth:.0%}",
                        f"{size / rate * 1e6:.0f}",
                    )
                table.add_section()
    console = Console()
    console.print(
        f"{len(cores)} threads, {native.native_isa()}, memory read {bandwidth / 1e9:.1f} GB/s"
    )
    console.print(table)


if __name__ == "__main__":
    main()
