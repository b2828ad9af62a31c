"""A rank's model: its shard of the weights, its KV cache, and the graphs it can replay."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from precast.errors import ConfigError
from precast.graphs.difference import relative_difference
from precast.graphs.factors import needs_of, rank_factors
from precast.graphs.replay import Graph
from precast.models.blocks import Paging, Shape
from precast.models.config import load_config
from precast.models.forward import hidden_states, logits
from precast.models.kv_cache import LayerCache, new_cache
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights import Weights, load_weights
from precast.ops import providers
from services.decode_worker.rank_protocol import MAX_DIFFERENCE, Init, Shadow


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's tensors: int64 ids and positions [T], and where their keys and values go."""

    token_ids: Tensor
    positions: Tensor
    paging: Paging

    @property
    def sequences(self) -> int:
        return self.paging.context_lens.shape[0]


@dataclass(kw_only=True)
class RankModel:
    shape: Shape
    weights: Weights
    caches: list[LayerCache]
    factors: dict[str, str]
    vocab_size: int
    load_s: float
    kernels: dict[str, str]
    """Who serves each operator, and why it is not who was asked for."""
    graphs: dict[int, Graph] = field(default_factory=dict)
    candidates: dict[int, Graph] = field(default_factory=dict)
    """Graphs on trial (``canary.py``), by batch size."""

    def prefill(self, batch: Batch) -> Tensor:
        """Eager ragged forward pass; returns logits [S, V] of each sequence's last token."""
        hidden = self._hidden(batch)
        last = batch.paging.query_starts[1:].long() - 1
        return logits(self.shape, self.weights, hidden[last])

    def decode(self, batch: Batch) -> tuple[Tensor, int]:
        """One token a sequence; returns logits [S, V] and the captured size that ran, 0 if
        eager."""
        graph = self._graph_for(batch.sequences)
        if graph is None:
            return logits(self.shape, self.weights, self._hidden(batch)), 0
        padded = pad(batch, graph.batch_size)
        out = graph.replay(padded.token_ids, padded.positions, padded.paging)
        return out[: batch.sequences], graph.batch_size

    def shadow(self, batch: Batch) -> tuple[Tensor, int, Shadow | None]:
        """``decode`` with the candidate tried between two replays of the graph that serves.

        The last replay writes over what the candidate has written, so the cache ends up as if there
        were no candidate.
        """
        logits, size = self.decode(batch)
        candidate = self.candidates.get(size)
        if candidate is None:
            return logits, size, None
        padded = pad(batch, size)
        started = time.perf_counter()
        tried = candidate.replay(padded.token_ids, padded.positions, padded.paging)
        between = time.perf_counter()
        again = self.graphs[size].replay(padded.token_ids, padded.positions, padded.paging)
        ended = time.perf_counter()
        difference = relative_difference(tried[: batch.sequences], again[: batch.sequences])
        shadow = Shadow(
            difference=min(difference, MAX_DIFFERENCE),
            candidate_us=(between - started) * 1e6,
            current_us=(ended - between) * 1e6,
        )
        return again[: batch.sequences], size, shadow

    def load_graph(self, batch_size: int, package: Path, *, candidate: bool = False) -> float:
        """Loads a verified package and swaps it in; returns milliseconds. Raises
        ArtifactRejected."""
        started = time.perf_counter()
        graph = Graph(package, batch_size, self.shape, self.weights, self.caches)
        (self.candidates if candidate else self.graphs)[batch_size] = graph
        return (time.perf_counter() - started) * 1e3

    def _graph_for(self, sequences: int) -> Graph | None:
        """The smallest captured size that holds the batch."""
        sizes = [size for size in self.graphs if size >= sequences]
        return self.graphs[min(sizes)] if sizes else None

    def _hidden(self, batch: Batch) -> Tensor:
        return hidden_states(
            self.shape,
            self.weights,
            self.caches,
            batch.token_ids,
            batch.positions,
            batch.paging,
        )


def load(init: Init) -> RankModel:
    """Loads the rank's shard and allocates its KV cache. Raises PrecastError with one line."""
    started = time.perf_counter()
    folder = Path(init.model_dir)
    config = load_config(folder)
    if init.max_context_length > config.max_position_embeddings:
        raise ConfigError(
            f"max_context_length={init.max_context_length} exceeds the model's "
            f"{config.max_position_embeddings} positions"
        )
    part = shard(config, init.tp_rank, init.tp_size)
    shape = shape_of(config, part, init.precision)
    selection = providers.select(init.kernel_provider, needs_of(shape))
    providers.start(selection)  # before weights are packed, because each has its own formats
    weights = load_weights(
        folder, config, part, shape, init.max_context_length, Path(init.packed_dir)
    )
    return RankModel(
        shape=shape,
        weights=weights,
        caches=[
            new_cache(
                shape.kv_dtype,
                blocks=init.kv_blocks,
                kv_heads=shape.kv_heads,
                block_size=init.block_size,
                head_dim=shape.head_dim,
                token_major=selection.token_major_cache,
            )
            for _ in range(config.num_layers)
        ],
        factors=rank_factors(
            shape,
            block_size=init.block_size,
            torch_version=str(torch.__version__),
        ),
        vocab_size=config.vocab_size,
        load_s=time.perf_counter() - started,
        kernels=providers.described(selection),
    )


def pad(batch: Batch, rows: int) -> Batch:
    """The decode batch with rows added that write nothing and attend to nothing."""
    extra = rows - batch.sequences
    if extra == 0:
        return batch
    paging = batch.paging
    starts = torch.arange(rows + 1, dtype=torch.int32)
    return Batch(
        token_ids=_append(batch.token_ids, extra, 0),
        positions=_append(batch.positions, extra, 0),
        paging=Paging(
            slots=_append(paging.slots, extra, -1),
            query_starts=starts,
            context_lens=_append(paging.context_lens, extra, 0),
            block_tables=_append(paging.block_tables, extra, 0),
        ),
    )


def _append(tensor: Tensor, rows: int, value: int) -> Tensor:
    return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), value)])
