"""How many KV blocks a decode worker gets, from what its weights leave of the memory it may take.

The cache costs memory only as it fills, so too large a cache starts well and is killed under load:
what can't fit is refused at the start, with the numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from precast.config.settings import DecodeWorkerSettings
from precast.errors import ConfigError
from precast.models.config import ModelConfig, load_config
from precast.models.precision import cached_head_bytes
from precast.models.sharding import kv_heads_held
from precast.models.weights.size import weight_bytes
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
    """Of a KV block over all ranks."""
    weight_bytes: int
    """Of all ranks."""
    process_bytes: int
    """Of leader and ranks, besides weights and cache."""
    why: str

    @property
    def kv_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def nbytes(self) -> int:
        """All of it."""
        return self.weight_bytes + self.kv_bytes + self.process_bytes


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
    block = _block_bytes(settings, config)
    precision = settings.precision(config.own_quantization)
    weights = weight_bytes(config, precision, tp=settings.tp, positions=context)
    fixed = weights + (settings.tp + 1) * PROCESS_BYTES
    mine = free.nbytes // settings.replicas
    blocks = _blocks(settings, context, min(int(mine * kv_share), mine - fixed) // block)
    if fixed + blocks * block > mine:
        raise ConfigError(_too_large(settings, free, weights, blocks * block))
    return Sizing(
        context=context,
        blocks=blocks,
        block_bytes=block,
        weight_bytes=weights,
        process_bytes=(settings.tp + 1) * PROCESS_BYTES,
        why=f"{gib(weights)} are the weights'; {free.why}{_shared(settings)}",
    )


def _blocks(settings: DecodeWorkerSettings, context: int, most: int) -> int:
    """As many as were asked for; else a full batch of full contexts, up to ``most``, but at least
    one sequence's."""
    if settings.kv_blocks is not None:
        return settings.kv_blocks
    per_sequence = -(-context // settings.block_size)
    return max(per_sequence, min(settings.max_batch_size * per_sequence, most))


def _context(settings: DecodeWorkerSettings, config: ModelConfig) -> int:
    """Tokens of a sequence. Raises ConfigError if more are asked for than the model has."""
    wanted = settings.max_context_length or config.max_position_embeddings
    if wanted > config.max_position_embeddings:
        raise ConfigError(
            f"max_context_length = {wanted}: {settings.model} has "
            f"{config.max_position_embeddings} positions"
        )
    return wanted


def _block_bytes(settings: DecodeWorkerSettings, config: ModelConfig) -> int:
    """Keys and values of a block, in all layers."""
    heads = 2 * config.num_layers * kv_heads_held(config, settings.tp)
    return heads * settings.block_size * cached_head_bytes(settings.kv_dtype, config.head_dim)


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
