"""A rank's model: its shard of the weights, its KV cache, and the graphs it can replay."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from precast.errors import ConfigError
from precast.graphs.difference import relative_difference
from precast.graphs.factors import needs_of, rank_factors
from precast.graphs.runner import Graph
from precast.models.config import ModelConfig, load_config
from precast.models.forward import gathered, hidden_states, logits
from precast.models.kv_cache import LayerCache, new_cache
from precast.models.layers import Paging, Shape
from precast.models.load import Report, Weights, load_weights
from precast.models.options import Kind
from precast.models.shape import shape_of
from precast.models.sharding import shard
from precast.models.weights.adapter_folder import AdapterFiles, read_files, shape_of_adapters
from precast.models.weights.adapters import AdapterFolders
from precast.models.weights.packed_files import model_content
from precast.models.windows import window_of
from precast.ops import providers
from precast.system.memory import MappedFile, mapped_zeros
from services.decode_worker.ranks.protocol import MAX_DIFFERENCE, Init, Shadow

Ints = NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's tensors: int64 ids and positions [T], and where their keys and values go."""

    token_ids: Tensor
    positions: Tensor
    paging: Paging
    window_paging: Paging | None = None
    """Of layers that attend to a window, if they have blocks of their own."""
    adapters: Tensor | None = None
    """int32 [T] each token's adapter, 0 for none; None: there are none at all."""


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
    content: str
    """Digest of the files that it was loaded from, but for adapters'."""
    graphs: dict[int, Graph] = field(default_factory=dict)
    trials: dict[int, Graph] = field(default_factory=dict)
    """Graphs on trial (``shadow_trial.py``), by size."""
    adapter_slots: Tensor | None = None
    """int32: of each row of a step, what ``choose_adapters`` has said."""

    def step(self, batch: Batch, drawing: Ints, graph_size: int) -> Tensor:
        """Runs a step with the graph of a captured size, eagerly for 0. Returns this rank's logits
        [D, V] of the tokens that ``drawing``, int32 [D], names."""
        if graph_size:
            return _replay(self.graphs[graph_size], batch, _rows(batch, drawing))
        return self.logits(batch, drawing, self.hidden(batch))

    def choose_adapters(self, batch: Batch) -> None:
        """To be called before what follows runs a step, eagerly or by a graph: it finds the rows'
        adapters among the weights. Rows that pad a step have none."""
        if self.adapter_slots is not None:
            self.adapter_slots.zero_()
            if batch.adapters is not None:
                self.adapter_slots[: len(batch.adapters)] = batch.adapters

    def hidden(self, batch: Batch) -> Tensor:
        """Runs a step eagerly up to its hidden states [T, H]."""
        return hidden_states(
            self.shape,
            self.weights,
            self.caches,
            batch.token_ids,
            batch.positions,
            batch.paging,
            batch.window_paging,
        )

    def logits(self, batch: Batch, drawing: Ints, hidden: Tensor) -> Tensor:
        """What ``step`` returns, of its hidden states."""
        if len(drawing) == 0:
            return hidden.new_empty(0, 0)
        rows = _rows(batch, drawing)
        return logits(self.shape, self.weights, hidden if rows is None else hidden[rows])

    def shadow(self, batch: Batch, drawing: Ints, graph_size: int) -> tuple[Tensor, Shadow | None]:
        """``step`` with the trial graph run between two replays of the graph that serves.

        The last replay writes over what the trial graph has written: the cache ends up as if there
        were none.
        """
        trial = self.trials.get(graph_size)
        if trial is None:
            return self.step(batch, drawing, graph_size), None
        current = self.graphs[graph_size]
        ends = batch.paging.query_starts[1:].numpy() - 1
        rows = _rows(batch, drawing if len(drawing) else ends)
        _replay(current, batch, rows)
        started = time.perf_counter()
        tried = _replay(trial, batch, rows)
        between = time.perf_counter()
        again = _replay(current, batch, rows)
        ended = time.perf_counter()
        shadow = Shadow(
            difference=min(self._difference(tried, again), MAX_DIFFERENCE),
            trial_us=(between - started) * 1e6,
            current_us=(ended - between) * 1e6,
        )
        return again[: len(drawing)], shadow

    def _difference(self, tried: Tensor, expected: Tensor) -> float:
        """Over the logits of all ranks."""
        return relative_difference(*(gathered(self.shape, part) for part in (tried, expected)))

    def load_graph(self, num_tokens: int, package: Path, *, trial: bool = False) -> float:
        """Loads a verified package and swaps it in; returns milliseconds. Raises
        ArtifactRejected."""
        started = time.perf_counter()
        graph = Graph(package, num_tokens, self.shape, self.weights, self.caches)
        (self.trials if trial else self.graphs)[num_tokens] = graph
        return (time.perf_counter() - started) * 1e3


def load(init: Init, report: Report, kv_file: int | None = None) -> RankModel:
    """Loads the rank's shard, and maps its KV cache: ``kv_file``, or memory of its own. Raises
    PrecastError with one line."""
    started = time.perf_counter()
    folder = Path(init.model_dir)
    content = model_content(folder, Path(init.packed_dir))
    config = load_config(folder)
    if init.max_context_length > config.max_position_embeddings:
        raise ConfigError(
            f"max_context_length={init.max_context_length} exceeds the model's "
            f"{config.max_position_embeddings} positions"
        )
    part = shard(config, init.tp_rank, init.tp_size)
    adapters = [
        read_files(AdapterFiles(name, *map(Path, files)), config) for name, *files in init.adapters
    ]
    shape = shape_of(config, part, init.precision, shape_of_adapters(adapters))
    selection = providers.select(init.kernel_provider, needs_of(shape))
    providers.start(selection)  # before weights are packed, because each has its own formats
    source = AdapterFolders(adapters) if adapters else None
    weights = load_weights(
        folder, config, part, shape, init.max_context_length, Path(init.packed_dir), report, source
    )
    memory = mapped_zeros if kv_file is None else MappedFile(kv_file).next
    return RankModel(
        shape=shape,
        weights=weights,
        caches=[
            new_cache(
                shape.kv_dtype,
                blocks=_cache_blocks(init, config, layer.kind),
                kv_heads=shape.kv_heads,
                block_size=init.block_size,
                head_dim=shape.head_dim,
                token_major=selection.token_major_cache,
                memory=memory,
            )
            for layer in config.layers
        ],
        factors=rank_factors(
            shape,
            block_size=init.block_size,
            torch_version=str(torch.__version__),
        ),
        vocab_size=config.vocab_size,
        load_s=time.perf_counter() - started,
        kernels=providers.described(selection),
        content=content,
        adapter_slots=None if source is None else source.slots,
    )


def _cache_blocks(init: Init, config: ModelConfig, kind: Kind) -> int:
    own = init.window_blocks if window_of(config.options, kind) else 0
    return own or init.kv_blocks


def _replay(graph: Graph, batch: Batch, rows: Tensor | None) -> Tensor:
    return graph.replay(
        batch.token_ids, batch.positions, batch.paging, rows, window_paging=batch.window_paging
    )


def _rows(batch: Batch, tokens: Ints) -> Tensor | None:
    """int64 rows of the tokens; None where these are all rows there are."""
    if len(tokens) == len(batch.token_ids):
        return None
    return torch.from_numpy(tokens.astype(np.int64))
