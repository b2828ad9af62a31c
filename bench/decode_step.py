"""Step time, captured graph against eager steps, in one process and alternating.

    python -m bench.decode_step [--quantization q4_0,int8] [--batch-sizes 1,4,16] [--prompts 64,256]

Captures what is missing (into a temporary folder), loads SmolLM2-135M's shapes with random weights
and prints a table: median step of each, their ratios, and the share of the memory bandwidth that
this machine showed in the same run. *eager* is the same step with the same operators, *torch* the
step with those that torch has (``torch_eager.py``).
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.torch_eager import TorchOperators
from precast.graphs import runner as graph_runner
from precast.graphs.capture import export
from precast.graphs.capture.export import Span
from precast.graphs.factors import rank_factors
from precast.graphs.runner import Graph
from precast.models.layers import Shape
from precast.models.load import random_weights
from precast.models.options import LlamaOptions
from precast.models.shape import ModelShape
from precast.ops import native, providers
from precast.system.memory import Arena
from precast.system.process import available_cpus, pin

LAYERS = 30
BLOCK_SIZE = 32
CONTEXT = 128
ROUNDS = 60
CORES = available_cpus()
THREADS = len(CORES)


def smollm2(quantization: str, head_quantization: str | None = None) -> Shape:
    return ModelShape(
        architecture="llama",
        hidden_size=576,
        query_groups=(3, 3, 3),
        head_dim=64,
        intermediate_size=1536,
        vocab_widths=(49152,),
        vocab_size=49152,
        rms_norm_eps=1e-5,
        options=LlamaOptions(),
        weight_dtype="fp32",
        quantization=quantization,
        head_quantization=head_quantization or quantization,
        kv_dtype="fp32",
    )


def capture(shape: Shape, num_tokens: int, folder: Path) -> Path:
    """The package for one batch size; captured if the folder lacks it."""
    factors = rank_factors(shape, block_size=BLOCK_SIZE, torch_version=str(torch.__version__))
    return capture_factors(factors, num_tokens, folder / f"{shape.quantization}-{num_tokens}")


def capture_factors(factors: dict[str, str], num_tokens: int, out: Path) -> Path:
    """The same for a rank's graph factors, in a folder of their own."""
    if not (out / "graph.pt2").exists():
        out.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-m", "precast.graphs.capture.entry"]
        subprocess.run(
            [*program, "--out", str(out), "--kept", str(out.parent / "kept")],
            input=json.dumps({**factors, "num_tokens": str(num_tokens)}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=True,
        )
    return out / "graph.pt2"


Timed = Callable[[], object]


def nothing() -> None:
    pass


def alternate(
    functions: Sequence[Timed], before: Sequence[Timed] = (), rounds: int = ROUNDS
) -> list[float]:
    """Median seconds of each function, called in turn so that noise meets all alike.

    ``before``: what is called first for each function, untimed.
    """
    times: list[list[float]] = [[] for _ in functions]
    before = before or [nothing] * len(functions)
    for _ in range(rounds):
        for prepare, function, samples in zip(before, functions, times, strict=True):
            prepare()
            function()  # the other one's data is in the caches
            start = time.perf_counter()
            function()
            samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


def read_bandwidth() -> float:
    """Bytes a second that this machine's memory gives to the pool's threads, at its best."""
    data = Arena().empty((512 << 20,)).view(torch.int64)
    data.fill_(1)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        torch.ops.precast.read_memory(data)
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Seconds of a step each way, and the bytes of weights that it reads."""

    graph_s: float
    eager_s: float
    torch_s: float
    read: int


def measure(shape: Shape, spans: list[Span], package: Path) -> Steps:
    """Logits are those of each sequence's last token."""
    generator = torch.Generator().manual_seed(0)
    plan = export.verification_plan(shape, LAYERS)
    weights = random_weights(shape, plan, export.CAPTURE_POSITIONS, generator)
    caches = [export.random_cache(shape, BLOCK_SIZE, generator) for _ in range(LAYERS)]
    inputs = export.step_inputs(shape, BLOCK_SIZE, spans, generator)
    tokens = len(inputs.token_ids)
    graph = Graph(package, tokens, shape, weights, caches)
    rows = None if tokens == len(spans) else inputs.paging.query_starts[1:].long() - 1
    ours, torchs = providers.active(), TorchOperators().selection()
    graph_s, eager_s, torch_s = alternate(
        [
            lambda: graph.replay(inputs.token_ids, inputs.positions, inputs.paging, rows),
            lambda: export.eager_step(shape, inputs, weights, caches, rows),
            lambda: export.eager_step(shape, inputs, weights, caches, rows),
        ],
        [lambda: use(ours, 1), lambda: use(ours, 1), lambda: use(torchs, THREADS)],
        ROUNDS if tokens < 64 else ROUNDS // 4,
    )
    use(ours, 1)
    _embedding, layers, head = graph_runner.runner_weights(weights, caches)
    read = [*head, *(tensor for layer in layers for tensor in layer[2:])]
    return Steps(
        graph_s=graph_s,
        eager_s=eager_s,
        torch_s=torch_s,
        read=sum(tensor.nbytes for tensor in read),
    )


def use(selection: providers.Selection, threads: int) -> None:
    """Who serves the operators from now on, and how many threads torch's own take.

    Threads that torch starts run where this one may: on all cores then, not on its own alone.
    """
    pin(CORES if threads > 1 else CORES[:1])
    torch.set_num_threads(threads)
    if providers.active() != selection:
        providers.start(selection)


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quantization", default="q4_0,q4_1,q8_0,int8,none")
    parser.add_argument("--batch-sizes", default="1")
    parser.add_argument("--prompts", default="", help="steps of one prompt with so many tokens")
    parser.add_argument("--graphs", type=Path, help="keep captured graphs here")
    arguments = parser.parse_args()
    native.start_threads(CORES)
    bandwidth = read_bandwidth()
    columns = ("graph ms", "eager ms", "torch ms", "eager / graph", "torch / graph")
    table = Table("weights", "step", *columns, "GB/s", "of read")
    steps = [("decode", size) for size in sizes(arguments.batch_sizes)]
    steps += [("prompt", size) for size in sizes(arguments.prompts)]
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        folder = arguments.graphs or Path(scratch)
        for quantization in arguments.quantization.split(","):
            shape = smollm2(quantization)
            for kind, size in steps:
                gc.collect()
                package = capture(shape, size, folder)
                one, whole = Span(new=1, context=CONTEXT), Span(new=size, context=size)
                seen = measure(shape, [one] * size if kind == "decode" else [whole], package)
                table.add_row(
                    "fp32" if quantization == "none" else quantization,
                    f"{kind} {size}",
                    f"{seen.graph_s * 1e3:.2f}",
                    f"{seen.eager_s * 1e3:.2f}",
                    f"{seen.torch_s * 1e3:.2f}",
                    f"{seen.eager_s / seen.graph_s:.2f}",
                    f"{seen.torch_s / seen.graph_s:.2f}",
                    f"{seen.read / seen.graph_s / 1e9:.1f}",
                    f"{seen.read / seen.graph_s / bandwidth:.0%}",
                )
    title = f"SmolLM2-135M shapes, {THREADS} threads, {native.native_isa()}, "
    Console().print(
        title + f"memory read {bandwidth / 1e9:.1f} GB/s, load {os.getloadavg()[0]:.1f}"
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
