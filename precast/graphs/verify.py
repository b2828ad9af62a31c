"""Replays a captured graph against eager before anybody else gets it."""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from precast.graphs import capture_models as models
from precast.graphs.bounds import bound_of
from precast.graphs.comparison import compare
from precast.graphs.factors import shape_from
from precast.graphs.replay import Graph
from precast.graphs.verify_peers import Group
from precast.models.blocks import Shape
from precast.models.kv_cache import read_cache
from precast.models.weights import random_weights

SEED = 1
CASES = ("contexts alike", "block edges", "contexts mixed", "padded rows")
VERIFY_LAYERS = 2
TIMED_STEPS = 20
VERIFY_STEPS = 2 * 4 + TIMED_STEPS
"""Steps in a verification: each of the four cases of _context_cases twice, and the timed ones."""


def layers_to_verify(shape: Shape) -> int:
    """How many layers the verified model has: all kinds, and at least VERIFY_LAYERS."""
    return len(models.verification_plan(shape, VERIFY_LAYERS))


def verify(factors: Mapping[str, str], package: Path, group: Group) -> tuple[float, float]:
    """Replays against eager on random and edge inputs. Returns the largest relative difference and
    the median step time of a model of VERIFY_LAYERS layers, microseconds. Raises CaptureFailed."""
    shape, batch, block = (
        shape_from(factors),
        int(factors["batch_size"]),
        int(factors["block_size"]),
    )
    generator = torch.Generator().manual_seed(SEED)
    plan = models.verification_plan(shape, VERIFY_LAYERS)
    weights = random_weights(shape, plan, models.CAPTURE_POSITIONS, generator)
    caches = [models.random_cache(shape, block, generator) for _ in plan]
    eager_caches = [type(c)(c.k.clone(), c.v.clone()) for c in caches]
    cases = _context_cases(batch, block)
    worst = 0.0
    group.join()
    with torch.inference_mode():
        graph = Graph(package, batch, shape, weights, caches)
        for number, contexts in enumerate(cases):
            inputs = models.step_inputs(shape, block, contexts, generator)
            live = torch.tensor(contexts) > 0
            expected = models.eager_step(shape, inputs, weights, eager_caches)[live]
            actual = graph.replay(inputs.token_ids, inputs.positions, inputs.paging)[live]
            outputs = {"logits": (actual, expected)}
            for layer, both in enumerate(zip(caches, eager_caches, strict=True)):
                ours, theirs = map(read_cache, both)
                outputs[f"keys of layer {layer}"] = ours.k, theirs.k
                outputs[f"values of layer {layer}"] = ours.v, theirs.v
            difference = compare(
                outputs,
                bound=bound_of(factors),
                case=CASES[number],
                seed=SEED,
                inputs=inputs.tensors(),
                folder=package.parent,
            )
            worst = max(worst, difference)
        times = []
        for _ in range(TIMED_STEPS):
            start = time.perf_counter()
            graph.replay(inputs.token_ids, inputs.positions, inputs.paging)
            times.append(time.perf_counter() - start)
    return worst, statistics.median(times) * 1e6


def _context_cases(batch: int, block: int) -> list[list[int]]:
    """Context lengths to verify with: alike, at block edges, mixed, and with padded rows."""
    edges = [1, 2, block - 1, block, block + 1, 3 * block, 4 * block - 1]
    return [
        [5] * batch,
        [edges[row % len(edges)] for row in range(batch)],
        [(row * 37) % (4 * block) + 1 for row in range(batch)],
        [7 + row if row <= batch // 2 else 0 for row in range(batch)],
    ]
