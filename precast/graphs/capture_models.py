"""What is captured: a decode step's three parts as modules, with example inputs of the right
shapes.

A package holds ``embed``, ``layer`` and ``head``. The layer is captured once and replayed for every
layer of the model with that layer's weights (``csrc/step_runner.cpp``), so capture time and
artifact size don't grow with depth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from precast.models import llama
from precast.models.kv_cache import LayerCache, fill_cache, new_cache
from precast.models.llama import (
    EmbedWeights,
    HeadWeights,
    LayerWeights,
    Linear,
    LlamaShape,
    Paging,
)
from precast.models.weights import DTYPES, Weights, pack_linear
from precast.ops.memory import Arena
from precast.ops.packing import Format

CAPTURE_POSITIONS = 256
CAPTURE_BLOCKS = 64
"""Sizes of the example tables; the graph is dynamic in them."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One decode step's inputs; rows past the live ones are padding."""

    token_ids: Tensor
    positions: Tensor
    paging: Paging


@dataclass(frozen=True, kw_only=True)
class Part:
    """One model of the package: a function of flat tensors."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    dynamic: tuple[dict[int, Any] | None, ...]
    """For each input: dimensions that may vary between calls."""


class _Flat(nn.Module):
    def __init__(self, function: Callable[..., Any], spec: TreeSpec) -> None:
        super().__init__()
        self._function = function
        self._spec = spec

    def forward(self, *flat: Tensor) -> Any:
        return self._function(*tree_unflatten(flat, self._spec))


def random_weights(shape: LlamaShape, layers: int, generator: torch.Generator) -> Weights:
    """Weights of the shape's formats with the variance that keeps activations near one."""

    arena = Arena()

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div_(columns**0.5)

    def packed(rows: int, columns: int, bias: bool = False, fmt: Format | None = None) -> Linear:
        added = torch.randn(rows, generator=generator) * 0.1 if bias else None
        return pack_linear(
            shape.linear_format if fmt is None else fmt, matrix(rows, columns), added, arena
        )

    def norm() -> Tensor:
        return torch.randn(shape.hidden_size, generator=generator).mul_(0.1).add_(1)

    hidden, q_size = shape.hidden_size, shape.q_heads * shape.head_dim
    qkv_size = q_size + 2 * shape.kv_heads * shape.head_dim
    angles = torch.rand(CAPTURE_POSITIONS, shape.head_dim // 2, generator=generator) * 6.28
    vocabulary = sum(shape.vocab_widths)
    table = torch.randn(vocabulary, hidden, generator=generator).to(DTYPES[shape.weight_dtype])
    return Weights(
        embed=EmbedWeights(table, angles.cos(), angles.sin()),
        layers=tuple(
            LayerWeights(
                attention_norm=norm(),
                qkv=packed(qkv_size, hidden, shape.attention_bias),
                output=packed(hidden, q_size, shape.attention_bias),
                mlp_norm=norm(),
                gate_up=packed(2 * shape.intermediate_size, hidden, shape.mlp_bias),
                down=packed(hidden, shape.intermediate_size, shape.mlp_bias),
            )
            for _ in range(layers)
        ),
        head=HeadWeights(norm(), packed(shape.vocab_size, hidden, fmt=shape.head_format)),
    )


def random_cache(shape: LlamaShape, block_size: int, generator: torch.Generator) -> LayerCache:
    cache = new_cache(
        shape.kv_dtype,
        blocks=CAPTURE_BLOCKS,
        kv_heads=shape.kv_heads,
        block_size=block_size,
        head_dim=shape.head_dim,
    )
    if shape.kv_heads == 0:
        return cache
    size = (CAPTURE_BLOCKS * block_size, shape.kv_heads, shape.head_dim)
    fill_cache(
        cache, torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    )
    return cache


def step_inputs(
    shape: LlamaShape, block_size: int, contexts: list[int], generator: torch.Generator
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
    shape: LlamaShape, inputs: StepInputs, weights: Weights, caches: list[LayerCache]
) -> Tensor:
    """The step as plain function calls: what a graph must agree with. Returns logits [B, V]."""
    hidden, cos, sin = llama.embed(inputs.token_ids, inputs.positions, weights.embed)
    for layer_weights, cache in zip(weights.layers, caches, strict=True):
        hidden = llama.layer(shape, hidden, cos, sin, inputs.paging, cache, layer_weights)
    return llama.head(shape, hidden, weights.head)


def parts(
    shape: LlamaShape, batch_size: int, block_size: int, generator: torch.Generator
) -> list[Part]:
    """The three parts to capture for ``batch_size``."""
    weights = random_weights(shape, 1, generator)
    cache = random_cache(shape, block_size, generator)
    # Two blocks a row, so that no dimension that must stay dynamic has the special size one.
    inputs = step_inputs(shape, block_size, [block_size + 1] * batch_size, generator)
    hidden = torch.randn(batch_size, shape.hidden_size, generator=generator)
    cos = torch.randn(batch_size, shape.head_dim // 2, generator=generator)
    sin = torch.randn(batch_size, shape.head_dim // 2, generator=generator)

    def layer(hidden: Tensor, cos: Tensor, sin: Tensor, *rest: Any) -> Tensor:
        return llama.layer(shape, hidden, cos, sin, *rest)

    def head(hidden: Tensor, weights: HeadWeights) -> Tensor:
        return llama.head(shape, hidden, weights)

    dynamic = torch.export.Dim.DYNAMIC
    grows = {0: dynamic}
    return [
        _part(
            "layer",
            layer,
            (hidden, cos, sin, inputs.paging, cache, weights.layers[0]),
            {id(inputs.paging.block_tables): {1: dynamic}, id(cache.k): grows, id(cache.v): grows},
        ),
        _part("head", head, (hidden, weights.head), {}),
        _part(
            "embed",
            llama.embed,
            (inputs.token_ids, inputs.positions, weights.embed),
            {id(weights.embed.cos): grows, id(weights.embed.sin): grows},
        ),
    ]


def _part(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    dynamic: dict[int, dict[int, Any]],
) -> Part:
    flat, spec = tree_flatten(arguments)
    return Part(
        name=name,
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
