"""A step without a graph: the architecture's functions called layer by layer."""

from collections.abc import Sequence

from torch import Tensor

from precast.models.architectures import architecture_of
from precast.models.blocks import Paging, Rope, Shape
from precast.models.kv_cache import LayerCache
from precast.models.weights import Weights


def hidden_states(
    shape: Shape,
    weights: Weights,
    caches: Sequence[LayerCache],
    token_ids: Tensor,
    positions: Tensor,
    paging: Paging,
) -> Tensor:
    """int64 [T] ids and positions to hidden states [T, H] behind the last layer."""
    module = architecture_of(shape)
    hidden, *tables = module.embed(shape, token_ids, positions, weights.embed)
    ropes = [Rope(*pair) for pair in zip(tables[::2], tables[1::2], strict=True)]
    for (kind, rope), layer, cache in zip(weights.plan, weights.layers, caches, strict=True):
        hidden = module.layer(shape, kind, hidden, ropes[rope], paging, cache, layer)
    return hidden


def logits(shape: Shape, weights: Weights, hidden: Tensor) -> Tensor:
    """Hidden states [T, H] to logits [T, vocabulary of all ranks]."""
    return architecture_of(shape).head(shape, hidden, weights.head)
