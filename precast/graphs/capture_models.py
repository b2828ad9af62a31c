"""What is captured: a decode step's parts as modules, with example inputs of the right
shapes.

A package holds ``embed``, ``head`` and a ``layer.<kind>`` for each kind of layer of the model. A
kind is captured once and replayed for every such layer with that layer's weights
(``csrc/step_runner.cpp``), so capture time and artifact size don't grow with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from precast.models.architectures import architecture_of
from precast.models.blocks import HeadWeights, Paging, Rope, Shape
from precast.models.forward import hidden_states, logits
from precast.models.kv_cache import LayerCache, fill_cache, new_cache
from precast.models.options import Kind, LayerPlan
from precast.models.weights import Weights, random_weights
from precast.ops import providers

CAPTURE_POSITIONS = 256
CAPTURE_BLOCKS = 64
"""Sizes of the example tables; the graph is dynamic in them."""
SHARED_ROWS = 6
"""Rows of the examples of parts that serve every number of rows."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One decode step's inputs; rows past the live ones are padding."""

    token_ids: Tensor
    positions: Tensor
    paging: Paging

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        paging = self.paging._asdict()
        return {"token_ids": self.token_ids, "positions": self.positions, **paging}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of the package: a function of flat tensors."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any] | None, ...]
    """For each input: dimensions that may vary between calls."""
    shared: bool
    """Whether it is the same for every batch size."""


class _Flat(nn.Module):
    def __init__(self, function: Callable[..., Any], spec: TreeSpec) -> None:
        super().__init__()
        self._function = function
        self._spec = spec

    def forward(self, *flat: Tensor) -> Any:
        return self._function(*tree_unflatten(flat, self._spec))


def verification_plan(shape: Shape, layers: int) -> list[LayerPlan]:
    """Every kind of layer and every rope, in at least ``layers`` layers."""
    count = max(layers, len(shape.kinds), shape.options.ropes)
    return [
        LayerPlan(shape.kinds[index % len(shape.kinds)], index % shape.options.ropes)
        for index in range(count)
    ]


def random_cache(shape: Shape, block_size: int, generator: torch.Generator) -> LayerCache:
    cache = new_cache(
        shape.kv_dtype,
        blocks=CAPTURE_BLOCKS,
        kv_heads=shape.kv_heads,
        block_size=block_size,
        head_dim=shape.head_dim,
        token_major=providers.active().token_major_cache,
    )
    if shape.kv_heads == 0:
        return cache
    size = (CAPTURE_BLOCKS * block_size, shape.kv_heads, shape.head_dim)
    fill_cache(
        cache, torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    )
    return cache


def step_inputs(
    shape: Shape, block_size: int, contexts: list[int], generator: torch.Generator
) -> StepInputs:
    """A decode step whose rows have the given context lengths, each counting the new token; 0
    pads."""
    width = max(1, -(-max(contexts) // block_size))
    tables = torch.stack(
        [torch.randperm(CAPTURE_BLOCKS, generator=generator)[:width] for _ in contexts]
    ).to(torch.int32)
    last = [max(length - 1, 0) for length in contexts]
    slots = [
        int(tables[row, at // block_size]) * block_size + at % block_size if length else -1
        for row, (length, at) in enumerate(zip(contexts, last, strict=True))
    ]
    rows = len(contexts)
    return StepInputs(
        token_ids=torch.randint(sum(shape.vocab_widths), (rows,), generator=generator),
        positions=torch.tensor(last) % CAPTURE_POSITIONS,
        paging=Paging(
            slots=torch.tensor(slots, dtype=torch.int32),
            query_starts=torch.arange(rows + 1, dtype=torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=tables,
        ),
    )


def eager_step(
    shape: Shape, inputs: StepInputs, weights: Weights, caches: list[LayerCache]
) -> Tensor:
    """The step as plain function calls: what a graph must agree with. Returns logits [B, V]."""
    hidden = hidden_states(
        shape, weights, caches, inputs.token_ids, inputs.positions, inputs.paging
    )
    return logits(shape, weights, hidden)


def parts(shape: Shape, batch_size: int, block_size: int, generator: torch.Generator) -> list[Part]:
    """The parts to capture for ``batch_size``: every kind of layer, head, embedding."""
    module = architecture_of(shape)
    plan = verification_plan(shape, len(shape.kinds))
    weights = random_weights(shape, plan, CAPTURE_POSITIONS, generator)
    # Two blocks a row, so that no dimension that must stay dynamic has the special size one.
    inputs = step_inputs(shape, block_size, [block_size + 1] * batch_size, generator)

    def head(hidden: Tensor, weights: HeadWeights) -> Tensor:
        return module.head(shape, hidden, weights)

    def embed(*arguments: Any) -> tuple[Tensor, ...]:
        return module.embed(shape, *arguments)

    grows = {0: torch.export.Dim.DYNAMIC}
    hidden = torch.randn(batch_size, shape.hidden_size, generator=generator)
    # Head and embedding are next to nothing beside the layers: one compilation serves every number
    # of rows, where the layers' are made for theirs.
    some = step_inputs(shape, block_size, [1] * SHARED_ROWS, generator)
    some_hidden = torch.randn(SHARED_ROWS, shape.hidden_size, generator=generator)
    return [
        *(
            _layer_part(shape, kind, layer, hidden, inputs, block_size, generator)
            for kind, layer in zip(shape.kinds, weights.layers, strict=False)
        ),
        _part("head", head, (some_hidden, weights.head), {id(some_hidden): grows}, shared=True),
        _part(
            "embed",
            embed,
            (some.token_ids, some.positions, weights.embed),
            {id(t): grows for t in (some.token_ids, some.positions, *weights.embed.ropes)},
            shared=True,
        ),
    ]


def _layer_part(
    shape: Shape,
    kind: Kind,
    weights: Any,
    hidden: Tensor,
    inputs: StepInputs,
    block_size: int,
    generator: torch.Generator,
) -> Part:
    cache = random_cache(shape, block_size, generator)
    angles = torch.rand(hidden.shape[0], shape.rotary_dim // 2, generator=generator)

    def layer(*arguments: Any) -> Tensor:
        return architecture_of(shape).layer(shape, kind, *arguments)

    dynamic = torch.export.Dim.DYNAMIC
    return _part(
        f"layer.{kind}",
        layer,
        (hidden, Rope(angles.cos(), angles.sin()), inputs.paging, cache, weights),
        {
            id(inputs.paging.block_tables): {1: dynamic},
            id(cache.k): {0: dynamic},
            id(cache.v): {0: dynamic},
        },
    )


def _part(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    dynamic: dict[int, dict[int, Any]],
    shared: bool = False,
) -> Part:
    flat, spec = tree_flatten(arguments)
    return Part(
        name=name,
        shared=shared,
        module=_Flat(function, spec),
        inputs=tuple(flat),
        dynamic=tuple(dynamic.get(id(tensor)) for tensor in flat),
    )


def runner_weights(
    weights: Weights, caches: list[LayerCache]
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """Weights as ``StepRunner.bind`` takes them: each layer's cache in front of its weights."""
    layers = [
        [cache.k, cache.v, *tree_leaves(layer)]
        for layer, cache in zip(weights.layers, caches, strict=True)
    ]
    return tree_leaves(weights.embed), layers, tree_leaves(weights.head)


def layer_models(shape: Shape) -> list[str]:
    """Names of a package's layer models, as ``StepRunner`` takes them."""
    return [f"layer.{kind}" for kind in shape.kinds]


def runner_plan(shape: Shape, weights: Weights) -> tuple[list[int], list[int]]:
    """For each layer, the index of its model and of its rope."""
    kinds = [shape.kinds.index(layer.kind) for layer in weights.plan]
    return kinds, [layer.rope for layer in weights.plan]
