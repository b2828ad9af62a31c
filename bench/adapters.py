"""What LoRA adapters cost: steps with them against steps of the model alone, alternating.

    python -m bench.adapters [--ranks 8,16] [--batch-sizes 1,16] [--prompts 512] [--graphs FOLDER]

SmolLM2-135M's shapes with random weights and adapters on all linears. Decode steps replay graphs,
which are captured first (two minutes; ``--graphs`` keeps them), steps of a prompt run eagerly as
those do that no graph holds. *none*: no row has an adapter; *one row*: the first has; *of 4*: all
have one, of four in turn; a prompt's rows have them in four runs. Ratios to the model alone are
medians of each round's, and so is what is added, in microseconds for each layer.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.decode_step import (
    BLOCK_SIZE,
    CONTEXT,
    CORES,
    LAYERS,
    Timed,
    capture_factors,
    sizes,
    smollm2,
)
from precast.graphs.capture import export as models
from precast.graphs.capture.export import Span
from precast.graphs.factors import rank_factors
from precast.graphs.runner import Graph
from precast.models.kv_cache import LayerCache
from precast.models.layers import Shape
from precast.models.load import Weights, random_weights
from precast.models.shape import AdapterShape
from precast.models.weights.adapters import RandomAdapters
from precast.ops import native

ADAPTERS: Final = 4
ALL: Final = ("down", "gate_up", "output", "qkv")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kind of step."""

    name: str
    spans: list[Span]
    graph: bool
    rounds: int
    choices: dict[str, Tensor]
    """Names of what is compared, and each row's adapter."""

    @property
    def tokens(self) -> int:
        return sum(span.new for span in self.spans)


def decode_step(batch: int, rounds: int) -> Step:
    choices = {"none": torch.zeros(batch), "one row": (torch.arange(batch) == 0) * 1}
    if batch > 1:
        for count in (1, 2, ADAPTERS):
            choices[f"of {count}"] = torch.arange(batch) % count + 1
    spans = [Span(new=1, context=CONTEXT)] * batch
    return Step(name=f"decode {batch}", spans=spans, graph=True, rounds=rounds, choices=choices)


def prompt_step(tokens: int, rounds: int) -> Step:
    quarter = torch.arange(tokens) * ADAPTERS // tokens + 1
    choices = {"none": torch.zeros(tokens), "of 1": torch.ones(tokens), f"of {ADAPTERS}": quarter}
    spans = [Span(new=tokens, context=tokens)]
    return Step(name=f"prompt {tokens}", spans=spans, graph=False, rounds=rounds, choices=choices)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Random weights of a shape, and the adapters among them."""

    shape: Shape
    weights: Weights
    caches: list[LayerCache]
    source: RandomAdapters | None

    @property
    def rank(self) -> int:
        return self.shape.adapters.rank if self.shape.adapters else 0

    def choose(self, each: Tensor) -> None:
        assert self.source is not None
        self.source.slots.zero_()
        self.source.slots[: len(each)] = each.int()


def load(shape: Shape) -> Model:
    generator = torch.Generator().manual_seed(0)
    plan = models.verification_plan(shape, LAYERS)
    source = RandomAdapters(shape.adapters, generator, ADAPTERS) if shape.adapters else None
    return Model(
        shape=shape,
        weights=random_weights(shape, plan, models.CAPTURE_POSITIONS, generator, source),
        caches=[models.random_cache(shape, BLOCK_SIZE, generator) for _ in range(LAYERS)],
        source=source,
    )


def runner(model: Model, step: Step, folder: Path) -> Timed:
    shape, weights, caches = model.shape, model.weights, model.caches
    generator = torch.Generator().manual_seed(1)
    inputs = models.step_inputs(shape, BLOCK_SIZE, step.spans, generator)
    if not step.graph:
        rows = inputs.paging.query_starts[1:].long() - 1
        return partial(models.eager_step, shape, inputs, weights, caches, rows)
    factors = rank_factors(shape, block_size=BLOCK_SIZE, torch_version=str(torch.__version__))
    package = capture_factors(factors, step.tokens, folder / f"rank{model.rank}-{step.tokens}")
    graph = Graph(package, step.tokens, shape, weights, caches)
    return partial(graph.replay, inputs.token_ids, inputs.positions, inputs.paging, None)


def measure(base: Model, adapted: Model, step: Step, folder: Path) -> list[list[float]]:
    """Each round's seconds, of the model alone and with each choice of adapters."""
    alone, own = (runner(model, step, folder) for model in (base, adapted))

    def one_round() -> Iterator[float]:
        yield timed(alone)
        for each in step.choices.values():
            adapted.choose(each)
            yield timed(own)

    return [list(one_round()) for _ in range(step.rounds + 1)][1:]


def timed(run: Timed) -> float:
    run()  # the other one's data is in the caches
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rows(rank: int, step: Step, rounds: Sequence[list[float]]) -> Iterator[tuple[str, ...]]:
    for index, name in enumerate(("model alone", *step.choices)):
        taken = statistics.median(one[index] for one in rounds)
        ratio = statistics.median(one[index] / one[0] for one in rounds)
        added = statistics.median(one[index] - one[0] for one in rounds) / LAYERS * 1e6
        shown = (f"{ratio:.2f}", f"{added:.0f}") if index else ("", "")
        yield step.name, str(rank), name, f"{taken * 1e3:.2f}", *shown


@contextmanager
def graphs(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", default="8,16")
    parser.add_argument("--batch-sizes", default="1,16")
    parser.add_argument("--prompts", default="512", help="steps of a prompt with so many tokens")
    parser.add_argument("--quantization", default="q4_0")
    parser.add_argument(
        "--rounds", type=int, default=30, help="of decode steps; a tenth of prompts"
    )
    parser.add_argument("--graphs", type=Path, help="keep captured graphs here")
    options = parser.parse_args()
    native.start_threads(CORES)
    steps = [decode_step(batch, options.rounds) for batch in sizes(options.batch_sizes)]
    steps += [prompt_step(n, max(2, options.rounds // 10)) for n in sizes(options.prompts)]
    table = Table("step", "rank", "adapters", "ms", "ratio", "µs a layer")
    with graphs(options.graphs) as folder, torch.inference_mode():
        base = load(smollm2(options.quantization))
        for rank in sizes(options.ranks):
            adapted = load(replace(base.shape, adapters=AdapterShape(rank=rank, targets=ALL)))
            for step in steps:
                for row in rows(rank, step, measure(base, adapted, step, folder)):
                    table.add_row(*row)
                table.add_section()
    title = f"{len(CORES)} threads, {native.native_isa()}, load {os.getloadavg()[0]:.1f}"
    Console().print(title)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
