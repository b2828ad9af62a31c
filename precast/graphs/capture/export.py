"""What is captured: a step's parts as modules, with example inputs of the right shapes.

A graph is made for a number of tokens, whoever they belong to: one each of decoding sequences, many
of a prompt, or both. The number of sequences is dynamic. A package holds ``embed``, ``head`` and a
``layer.<kind>`` for each kind of layer of the model. A kind is captured once and replayed for every
such layer with that layer's weights (``csrc/step_runner.cpp``), so capture time and artifact size
don't grow with depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from precast.models.architectures import architecture_of
from precast.models.forward import hidden_states, logits
from precast.models.kv_cache import LayerCache, fill_cache, new_cache
from precast.models.layers import HeadWeights, Paging, Rope, Shape
from precast.models.load import Weights, random_weights
from precast.models.options import Kind, LayerPlan
from precast.ops import providers

CAPTURE_POSITIONS = 256
CAPTURE_BLOCKS = 128
CAPTURE_SEQUENCES = 3
"""Sizes of the examples; the graph is dynamic in them."""
SHARED_ROWS = 6
"""Rows of the examples of parts that serve every number of rows."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One sequence's part of a step."""

    new: int
    """Its tokens in the step."""
    context: int
    """Its tokens in the cache once these are written."""


@dataclass(frozen=True, kw_only=True)
class StepInputs:
    """One step's inputs, without padding."""

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
    """Whether it is the same for every number of tokens."""


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


def blocks_for(tokens: int, block_size: int) -> int:
    """KV blocks of the caches that a graph of ``tokens`` tokens is verified with."""
    return max(CAPTURE_BLOCKS, 2 * -(-tokens // block_size))


def random_cache(
    shape: Shape, block_size: int, generator: torch.Generator, blocks: int = CAPTURE_BLOCKS
) -> LayerCache:
    cache = new_cache(
        shape.kv_dtype,
        blocks=blocks,
        kv_heads=shape.kv_heads,
        block_size=block_size,
        head_dim=shape.head_dim,
        token_major=providers.active().token_major_cache,
    )
    if shape.kv_heads == 0:
        return cache
    size = (blocks * block_size, shape.kv_heads, shape.head_dim)
    fill_cache(
        cache, torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    )
    return cache


def step_inputs(
    shape: Shape,
    block_size: int,
    spans: Sequence[Span],
    generator: torch.Generator,
    blocks: int = CAPTURE_BLOCKS,
) -> StepInputs:
    """A step of these sequences, each with blocks of its own. Raises ValueError if there are not
    enough."""
    width = max(1, -(-max(span.context for span in spans) // block_size))
    if width * len(spans) > blocks:
        raise ValueError(f"{len(spans)} sequences of {width} blocks don't fit in {blocks}")
    shuffled = torch.randperm(blocks, generator=generator)[: width * len(spans)]
    tables = shuffled.view(len(spans), width).to(torch.int32)
    positions = [range(span.context - span.new, span.context) for span in spans]
    slots = [
        int(tables[row, at // block_size]) * block_size + at % block_size
        for row, own in enumerate(positions)
        for at in own
    ]
    at = torch.tensor([at for own in positions for at in own])
    starts = torch.tensor([0, *(span.new for span in spans)]).cumsum(0)
    return StepInputs(
        token_ids=torch.randint(sum(shape.vocab_widths), (len(slots),), generator=generator),
        positions=at % CAPTURE_POSITIONS,
        paging=Paging(
            slots=torch.tensor(slots, dtype=torch.int32),
            query_starts=starts.to(torch.int32),
            context_lens=torch.tensor([span.context for span in spans], dtype=torch.int32),
            block_tables=tables,
        ),
    )


def decode_inputs(
    shape: Shape,
    block_size: int,
    contexts: Sequence[int],
    generator: torch.Generator,
    blocks: int = CAPTURE_BLOCKS,
) -> StepInputs:
    """A decode step of sequences whose contexts, the new token counted, are these."""
    spans = [Span(new=1, context=context) for context in contexts]
    return step_inputs(shape, block_size, spans, generator, blocks)


def eager_step(
    shape: Shape,
    inputs: StepInputs,
    weights: Weights,
    caches: list[LayerCache],
    rows: Tensor | None = None,
) -> Tensor:
    """The step as plain function calls: what a graph must agree with. Returns logits [R, V] of the
    tokens ``rows``; of all without it."""
    hidden = hidden_states(
        shape, weights, caches, inputs.token_ids, inputs.positions, inputs.paging
    )
    return logits(shape, weights, hidden if rows is None else hidden[rows])


def parts(shape: Shape, tokens: int, block_size: int, generator: torch.Generator) -> list[Part]:
    """The parts to capture for steps of ``tokens`` tokens: every kind of layer, head, embedding."""
    module = architecture_of(shape)
    plan = verification_plan(shape, len(shape.kinds))
    weights = random_weights(shape, plan, CAPTURE_POSITIONS, generator)

    def head(hidden: Tensor, weights: HeadWeights) -> Tensor:
        return module.head(shape, hidden, weights)

    def embed(*arguments: Any) -> tuple[Tensor, ...]:
        return module.embed(shape, *arguments)

    grows = {0: torch.export.Dim.DYNAMIC}
    # Head and embedding are next to nothing beside the layers: one compilation serves every number
    # of rows, where the layers' are made for theirs.
    some = decode_inputs(shape, block_size, [1] * SHARED_ROWS, generator)
    some_hidden = torch.randn(SHARED_ROWS, shape.hidden_size, generator=generator)
    return [
        *(
            _layer_part(shape, kind, layer, tokens, block_size, generator)
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


def _example_paging(tokens: int) -> Paging:
    """Of the right shapes; what is in it is never looked at. No dimension that must stay dynamic
    has the special size one."""
    return Paging(
        slots=torch.zeros(tokens, dtype=torch.int32),
        query_starts=torch.zeros(CAPTURE_SEQUENCES + 1, dtype=torch.int32),
        context_lens=torch.zeros(CAPTURE_SEQUENCES, dtype=torch.int32),
        block_tables=torch.zeros(CAPTURE_SEQUENCES, 2, dtype=torch.int32),
    )


def _layer_part(
    shape: Shape,
    kind: Kind,
    weights: Any,
    tokens: int,
    block_size: int,
    generator: torch.Generator,
) -> Part:
    cache = random_cache(shape, block_size, generator)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator)
    angles = torch.rand(tokens, shape.rotary_dim // 2, generator=generator)
    paging = _example_paging(tokens)

    def layer(*arguments: Any) -> Tensor:
        return architecture_of(shape).layer(shape, kind, *arguments)

    dynamic = torch.export.Dim.DYNAMIC
    return _part(
        f"layer.{kind}",
        layer,
        (hidden, Rope(angles.cos(), angles.sin()), paging, cache, weights),
        {
            id(paging.query_starts): {0: dynamic},
            id(paging.context_lens): {0: dynamic},
            id(paging.block_tables): {0: dynamic, 1: dynamic},
            id(cache.k): {0: dynamic},
            id(cache.v): {0: dynamic},
            **{id(tensor): {0: dynamic} for tensor in _of_adapters(weights)},
        },
    )


def _of_adapters(weights: Any) -> list[Tensor]:
    """Rows' slots, A and B: how many adapters there are is no part of a graph. No other weight is
    of their types and dimensions."""
    leaves: list[Tensor] = tree_leaves(weights)
    kinds = ((torch.int32, 1), (torch.float32, 3))
    return [leaf for leaf in leaves if (leaf.dtype, leaf.dim()) in kinds]


def _part(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    dynamic: dict[int, dict[int, Any]],
    *,
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
