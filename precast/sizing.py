"""How many KV blocks a decode worker gets, from what its weights leave of the memory it may take.

The cache costs memory only as it fills, so too large a cache starts well and is killed under load:
what can't fit is refused at the start, with the numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError
from precast.models.config import ModelConfig, load_config
from precast.models.precision import cached_head_bytes
from precast.models.sharding import kv_heads_held
from precast.models.weights.adapter_folder import Adapter, read_adapter
from precast.models.weights.size import adapter_bytes, weight_bytes
from precast.models.windows import blocks_of_window, model_window, window_layers
from precast.system.free_memory import FreeMemory, gib

KV_MEMORY_SHARE: Final = 0.3
"""Most of the free memory that the KV cache may take when its size is not set."""
PROCESS_BYTES: Final = 256 << 20
"""What a rank or a leader takes besides weights and cache: its interpreter, libraries, buffers."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """Of each replica."""

    context: int
    """Tokens of a sequence, at the most."""
    blocks: int
    block_bytes: int
    """Of a KV block over all ranks, in layers that attend to everything."""
    window_blocks: int
    """Of layers that attend to a window; 0: there are none."""
    window_block_bytes: int
    weight_bytes: int
    """Of all ranks, and of the leader's copies of adapters."""
    process_bytes: int
    """Of leader and ranks, besides weights and cache."""
    why: str

    @property
    def kv_bytes(self) -> int:
        return self.blocks * self.block_bytes + self.window_blocks * self.window_block_bytes

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.process_bytes


class _Layers(NamedTuple):
    """What a model's layers cache."""

    window: int
    """Of those that attend to one; 0: none does."""
    block: int
    """Bytes of a KV block, over all ranks, in those that attend to everything."""
    window_block: int
    """The same in those that attend to a window."""


def size(
    settings: DecodeWorkerSettings,
    folder: Path,
    free: FreeMemory,
    *,
    kv_share: float = KV_MEMORY_SHARE,
) -> Sizing:
    """``folder``: the model's. ``kv_share``: most of the free memory that the KV cache may take
    where its size is not set. Raises ConfigError if the worker can't fit, and what ``load_config``
    raises."""
    config = load_config(folder)
    context = _context(settings, config)
    layers = _layers(settings, config)
    precision = settings.precision(config.own_quantization)
    weights = weight_bytes(config, precision, tp=settings.tp, positions=context)
    adapters = _adapters(settings, config)
    weights += adapter_bytes(config, adapters) + sum(one.nbytes for one in adapters)
    fixed = weights + (settings.tp + 1) * PROCESS_BYTES
    mine = free.nbytes // settings.replicas
    most = min(int(mine * kv_share), mine - fixed)
    windows = _window_blocks(settings, context, layers, most)
    blocks = _blocks(settings, context, layers, most - windows * layers.window_block)
    sizing = Sizing(
        context=context,
        blocks=blocks,
        block_bytes=layers.block,
        window_blocks=min(windows, blocks),
        window_block_bytes=layers.window_block,
        weight_bytes=weights,
        process_bytes=(settings.tp + 1) * PROCESS_BYTES,
        why=f"{gib(weights)} are the weights'; {free.why}{_shared(settings)}",
    )
    if fixed + sizing.kv_bytes > mine:
        raise ConfigError(_too_large(settings, free, weights, sizing.kv_bytes))
    return sizing


def _adapters(settings: DecodeWorkerSettings, config: ModelConfig) -> list[Adapter]:
    return [read_adapter(name, folder, config) for name, folder in settings.adapter_folders]


def _blocks(settings: DecodeWorkerSettings, context: int, layers: _Layers, most: int) -> int:
    """As many as were asked for; else a full batch of full contexts, up to ``most`` bytes, but at
    least one sequence's."""
    if settings.kv_blocks is not None:
        return settings.kv_blocks
    per_sequence = -(-context // settings.block_size)
    full_batch = settings.max_batch_size * per_sequence
    return max(per_sequence, min(full_batch, most // layers.block) if layers.block else full_batch)


def _window_blocks(settings: DecodeWorkerSettings, context: int, layers: _Layers, most: int) -> int:
    """Those of a full batch's windows and of the prompts of two steps, and as many windows again
    for prompts that come again; up to ``most`` bytes, or half of that where other layers need some
    too. One sequence's at the least."""
    if not layers.window:
        return 0
    size = settings.block_size
    one, chunks = blocks_of_window(layers.window, size), -(-2 * settings.prefill_chunk // size)
    wanted = 2 * settings.max_batch_size * one + chunks
    if settings.kv_blocks is None:
        both = max(2 * layers.window_block, layers.window_block + layers.block)
        wanted = min(wanted, most // (both if layers.block else layers.window_block))
    return max(wanted, min(one + chunks, -(-context // size)))


def _context(settings: DecodeWorkerSettings, config: ModelConfig) -> int:
    """Tokens of a sequence. Raises ConfigError if more are asked for than the model has."""
    wanted = settings.max_context_length or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise ConfigError(
            f"max_context_length = {wanted}: {settings.model} has "
            f"{config.max_position_embeddings} positions"
        )
    return wanted


def _layers(settings: DecodeWorkerSettings, config: ModelConfig) -> _Layers:
    heads, windows = 2 * kv_heads_held(config, settings.tp), window_layers(config)
    layer = heads * settings.block_size * cached_head_bytes(settings.kv_dtype, config.head_dim)
    return _Layers(
        window=model_window(config),
        block=layer * (config.num_layers - windows),
        window_block=layer * windows,
    )


def _too_large(settings: DecodeWorkerSettings, free: FreeMemory, weights: int, cache: int) -> str:
    processes = (settings.tp + 1) * PROCESS_BYTES
    asked = settings.kv_blocks is not None
    what = f"kv_blocks = {settings.kv_blocks}" if asked else "one sequence"
    advice = "kv_blocks" if asked else "max_context_length"
    return (
        f"{settings.model} does not fit: weights {gib(weights)}, KV cache {gib(cache)} ({what}), "
        f"processes {gib(processes)}; {free.why}{_shared(settings)}; a smaller {advice} or "
        f"quantization takes less"
    )


def _shared(settings: DecodeWorkerSettings) -> str:
    return f", for {settings.replicas} replicas" if settings.replicas > 1 else ""
