"""Replays a captured graph against eager before anybody else gets it, and measures it."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from precast.graphs.capture import export
from precast.graphs.capture.verify.cases import (
    VERIFY_LAYERS,
    Case,
    cases,
    timed_layers,
    timed_rounds,
    timed_spans,
)
from precast.graphs.capture.verify.compare import compare
from precast.graphs.capture.verify.peers import Group
from precast.graphs.capture.verify.tolerances import bound_of
from precast.graphs.factors import shape_from
from precast.graphs.runner import Graph
from precast.models.kv_cache import LayerCache, read_cache
from precast.models.layers import Shape
from precast.models.load import Weights, random_weights

SEED = 1


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """A graph and what it runs on."""

    package: Path
    factors: Mapping[str, str]
    shape: Shape
    tokens: int
    block: int
    weights: Weights
    caches: list[LayerCache]
    eager_caches: list[LayerCache]
    generator: torch.Generator

    @property
    def blocks(self) -> int:
        return export.blocks_for(self.tokens, self.block)

    def inputs(self, spans: tuple[export.Span, ...]) -> export.StepInputs:
        return export.step_inputs(self.shape, self.block, spans, self.generator, self.blocks)


def verify(factors: Mapping[str, str], package: Path, group: Group) -> tuple[float, float]:
    """Replays against eager on random and edge inputs. Returns the largest relative difference and
    the median time of a layer, microseconds on one thread. Raises CaptureFailed."""
    trial = _trial(factors, package)
    group.join()
    with torch.inference_mode():
        graph = Graph(package, trial.tokens, trial.shape, trial.weights, trial.caches)
        differences = [_difference(trial, graph, case) for case in cases(trial.tokens, trial.block)]
        return max(differences), _layer_us(trial)


def _trial(factors: Mapping[str, str], package: Path) -> _Trial:
    shape, block = shape_from(factors), int(factors["block_size"])
    tokens = int(factors["num_tokens"])
    generator = torch.Generator().manual_seed(SEED)
    plan = export.verification_plan(shape, VERIFY_LAYERS)
    weights = random_weights(shape, plan, export.CAPTURE_POSITIONS, generator)
    blocks = export.blocks_for(tokens, block)
    caches = [export.random_cache(shape, block, generator, blocks) for _ in plan]
    return _Trial(
        package=package,
        factors=factors,
        shape=shape,
        tokens=tokens,
        block=block,
        weights=weights,
        caches=caches,
        eager_caches=[type(c)(c.k.clone(), c.v.clone()) for c in caches],
        generator=generator,
    )


def _difference(trial: _Trial, graph: Graph, case: Case) -> float:
    """Of logits and caches, after the same step on both sides."""
    inputs = trial.inputs(case.spans)
    rows = None if case.rows is None else torch.tensor(case.rows, dtype=torch.int64)
    expected = export.eager_step(trial.shape, inputs, trial.weights, trial.eager_caches, rows)
    actual = graph.replay(inputs.token_ids, inputs.positions, inputs.paging, rows)
    outputs = {"logits": (actual, expected)} if case.rows != () else {}
    for layer, both in enumerate(zip(trial.caches, trial.eager_caches, strict=True)):
        ours, theirs = map(read_cache, both)
        outputs[f"keys of layer {layer}"] = ours.k, theirs.k
        outputs[f"values of layer {layer}"] = ours.v, theirs.v
    return compare(
        outputs,
        bound=bound_of(trial.factors),
        case=case.name,
        seed=SEED,
        inputs=inputs.tensors(),
        folder=trial.package.parent,
    )


def _layer_us(trial: _Trial) -> float:
    """What each further layer adds to a step, in microseconds. Layers share weights, which
    therefore lie in a cache: good for comparing sizes, too little where memory is what limits."""
    counts = timed_layers(trial.shape)
    graphs = [_stacked(trial, count) for count in counts]
    inputs = trial.inputs(timed_spans(trial.tokens, trial.block))
    nothing = torch.empty(0, dtype=torch.int64)
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(timed_rounds(trial.tokens)):
        for graph, own in zip(graphs, times, strict=True):
            start = time.perf_counter()
            graph.replay(inputs.token_ids, inputs.positions, inputs.paging, nothing)
            own.append(time.perf_counter() - start)
    few, many = map(statistics.median, times)
    return max(0.1, (many - few) / (counts[1] - counts[0]) * 1e6)


def _stacked(trial: _Trial, layers: int) -> Graph:
    """The graph over a model of so many layers, those of the trial again and again."""
    times = layers // len(trial.caches)
    weights = replace(
        trial.weights, plan=trial.weights.plan * times, layers=trial.weights.layers * times
    )
    return Graph(trial.package, trial.tokens, trial.shape, weights, trial.caches * times)
