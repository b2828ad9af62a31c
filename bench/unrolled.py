"""A step replayed layer by layer against one graph of the whole step, in one process, alternating.

    python -m bench.unrolled [--quantization q4_1] [--batch-sizes 1,8] [--graphs FOLDER]

What capturing a single layer costs at replay and saves at capture. The unrolled graph is made as a
package's parts are, by the same code generation and compiler, and run by the same C++ driver. Both
get SmolLM2-135M's shapes, random weights and the same step. The capture times leave imports,
verification and what all captures share out.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from bench.decode_step import BLOCK_SIZE, CONTEXT, LAYERS, alternate, smollm2
from precast.graphs import runner as graph_runner
from precast.graphs.capture import codegen, export
from precast.graphs.capture.build import Build, files
from precast.graphs.capture.export import Part, StepInputs
from precast.models.kv_cache import LayerCache
from precast.models.layers import Shape
from precast.models.load import Weights, random_weights
from precast.ops import native
from precast.system.process import available_cpus

ISA = "x86-64-v3"


class _Step(nn.Module):
    """Everything of a step: embedding, all layers, head."""

    def __init__(self, function: Callable[..., Tensor], spec: Any) -> None:
        super().__init__()
        self._function, self._spec = function, spec

    def forward(self, *flat: Tensor) -> list[Tensor]:
        return [self._function(*tree_unflatten(flat, self._spec))]


class _First(nn.Module):
    """The driver calls a head; this one is next to nothing."""

    def forward(self, *flat: Tensor) -> Tensor:
        return flat[0][:, :1] + 1


@dataclass(frozen=True, kw_only=True)
class Model:
    shape: Shape
    weights: Weights
    caches: list[LayerCache]
    inputs: StepInputs


def model_of(shape: Shape, batch_size: int) -> Model:
    generator = torch.Generator().manual_seed(0)
    plan = export.verification_plan(shape, LAYERS)
    return Model(
        shape=shape,
        weights=random_weights(shape, plan, export.CAPTURE_POSITIONS, generator),
        caches=[export.random_cache(shape, BLOCK_SIZE, generator) for _ in plan],
        inputs=export.decode_inputs(shape, BLOCK_SIZE, [CONTEXT] * batch_size, generator),
    )


def part(name: str, module: nn.Module, inputs: list[Tensor]) -> Part:
    return Part(
        name=name,
        module=module,
        inputs=tuple(inputs),
        dynamic=(None,) * len(inputs),
        shared=False,
    )


def unrolled_parts(model: Model) -> tuple[list[Part], list[Tensor]]:
    """The parts, and what the driver binds to the whole step's beside ids and positions."""

    def step(inputs: StepInputs, weights: Weights, caches: list[LayerCache]) -> Tensor:
        return export.eager_step(model.shape, inputs, weights, caches)

    whole = model.inputs, model.weights, model.caches
    leaves = (whole[0].token_ids, whole[0].positions, whole[0].paging)
    weights = (whole[1].embed, whole[1].layers, whole[1].head)

    def function(ids: Tensor, at: Tensor, paging: Any, parts: Any, caches: Any) -> Tensor:
        embed, layers, head = parts
        loaded = Weights(plan=model.weights.plan, embed=embed, layers=tuple(layers), head=head)
        return step(StepInputs(token_ids=ids, positions=at, paging=paging), loaded, caches)

    flat, spec = tree_flatten((*leaves, weights, model.caches))
    logits = torch.zeros(len(model.inputs.token_ids), 8)
    return [part("embed", _Step(function, spec), flat), part("head", _First(), [logits])], flat[2:]


def layered_parts(model: Model) -> list[Part]:
    generator = torch.Generator().manual_seed(0)
    return export.parts(model.shape, len(model.inputs.token_ids), BLOCK_SIZE, generator)


def compiled(parts: list[Part], folder: Path, kept: Path) -> tuple[Path, float]:
    """A package, and the seconds that it took."""
    from torch._inductor.package.package import package_aoti

    folder.mkdir(parents=True)
    build = Build(isa=ISA, folder=kept, work=folder)
    build.prepare()
    started = time.perf_counter()
    running = []
    for each in parts:
        code = codegen.generate(each, ISA)
        running.append(build.start(each.name, code.wrapper, code.kernels))
    for future in running:
        future.result()
    paths = {p.name: [str(path) for path in files(folder, p.name)] for p in parts}
    package_aoti(str(folder / "graph.pt2"), paths)  # type: ignore[arg-type]
    return folder / "graph.pt2", time.perf_counter() - started


def runner(package: Path, layers: list[str], tokens: int) -> Any:
    return torch.classes.precast.StepRunner(str(package), layers, tokens)


def measure(shape: Shape, batch_size: int, folder: Path) -> list[str]:
    model = model_of(shape, batch_size)
    kept = folder / "kept"
    compiled(layered_parts(model), folder / f"warm-up-{batch_size}", kept)
    layered, layered_s = compiled(layered_parts(model), folder / f"layered-{batch_size}", kept)
    parts, bound = unrolled_parts(model)
    unrolled, unrolled_s = compiled(parts, folder / f"unrolled-{batch_size}", kept)
    by_layer = runner(layered, graph_runner.layer_models(shape), batch_size)
    by_layer.bind(
        *graph_runner.runner_weights(model.weights, model.caches),
        *graph_runner.runner_plan(shape, model.weights),
    )
    whole = runner(unrolled, [], batch_size)
    whole.bind(bound, [], [], [], [], [])
    paging, no_windows = list(model.inputs.paging), list[Tensor]()
    step = model.inputs.token_ids, model.inputs.positions, paging, no_windows, None
    layered_step_s, unrolled_step_s = alternate(
        [lambda: by_layer.run(*step), lambda: whole.run(*step)]
    )
    return [
        str(batch_size),
        f"{layered_step_s * 1e6:.0f}",
        f"{unrolled_step_s * 1e6:.0f}",
        f"{layered_step_s / unrolled_step_s - 1:+.1%}",
        f"{layered_s:.1f}, {layered.stat().st_size / 2**20:.1f}",
        f"{unrolled_s:.1f}, {unrolled.stat().st_size / 2**20:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quantization", default="q4_1")
    parser.add_argument("--batch-sizes", default="1,8")
    arguments = parser.parse_args()
    cores = available_cpus()
    native.start_threads(cores)
    codegen.prepare(ISA)
    table = Table(
        "batch", "by layer µs", "unrolled µs", "by layer", "its s, MB", "unrolled's s, MB"
    )
    shape = smollm2(arguments.quantization)
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{scratch}/inductor"
        for batch_size in map(int, arguments.batch_sizes.split(",")):
            table.add_row(*measure(shape, batch_size, Path(scratch)))
    Console().print(
        f"SmolLM2-135M shapes, {arguments.quantization}, {len(cores)} threads, "
        f"{native.native_isa()}, load {os.getloadavg()[0]:.1f}"
    )
    Console().print(table)


if __name__ == "__main__":
    main()
