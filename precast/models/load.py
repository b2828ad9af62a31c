"""A rank's weights: out of a Hugging Face folder, or random ones of the same formats."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precast.errors import ConfigError, ModelCorrupt
from precast.models.architectures import architecture_of
from precast.models.config import ModelConfig
from precast.models.layers import EmbedWeights, HeadWeights, Shape
from precast.models.options import Kind, LayerPlan
from precast.models.quantized.source import QuantizedCheckpoint
from precast.models.rope import RopeConfig
from precast.models.sharding import Shard
from precast.models.weights.adapters import AdapterSource, RandomAdapters
from precast.models.weights.checkpoint import Checkpoint
from precast.models.weights.gguf_checkpoint import GgufCheckpoint
from precast.models.weights.loader import (
    Cut,
    Loader,
    Packer,
    Part,
    Source,
    cut_of,
    pack_in,
    pack_table,
)
from precast.models.weights.packed_files import (
    Keep,
    PackedFolder,
    keeping_packed,
    packed_path,
)
from precast.ops import providers
from precast.ops.mixed import MixedPart, write_parts
from precast.ops.packing import Format, packed_size
from precast.ops.scaled import Weight
from precast.system.memory import Arena

_T = TypeVar("_T")

RANDOM_ROWS = 2048
"""Distinct rows of a random vocabulary."""

Report = Callable[[int, int], None]
"""Takes how many layers are there, and of how many."""


def _no_report(_done: int, _total: int) -> None:
    """For those who don't want to know."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A rank's weights as the model's functions take them."""

    plan: tuple[LayerPlan, ...]
    embed: EmbedWeights
    layers: tuple[Any, ...]
    """For each layer, what its architecture's ``load_layer`` gives."""
    head: HeadWeights

    def nbytes(self) -> int:
        """Bytes of distinct storage."""
        tensors: list[Tensor] = tree_leaves((self.embed, self.layers, self.head))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())


def load_weights(
    folder: Path,
    config: ModelConfig,
    shard: Shard,
    shape: Shape,
    positions: int,
    kept: Path | None = None,
    report: Report = _no_report,
    adapters: AdapterSource | None = None,
) -> Weights:
    """Weights of one rank; rotary tables reach ``positions``. Raises ModelCorrupt.

    One layer at a time is read, cut and packed, so that the peak is the packed weights plus a
    layer. ``kept``: root of the folders where packed linears are kept between starts. ``report`` is
    called with each layer.
    """
    try:
        return _load(folder, config, shard, shape, positions, kept, report, adapters)
    except (SafetensorError, OSError) as error:
        raise ModelCorrupt(f"{folder}: weights can't be read: {error}") from error


def _load(
    folder: Path,
    config: ModelConfig,
    shard: Shard,
    shape: Shape,
    positions: int,
    kept: Path | None,
    report: Report,
    adapters: AdapterSource | None,
) -> Weights:
    if "file" in (shape.quantization, shape.head_quantization) and not config.has_own_types:
        raise ConfigError(
            f"{folder}: quantization = file, but its weights are not out of a GGUF file"
        )
    path = packed_path(kept, folder, shard, shape) if kept is not None else None
    if path is None:
        return _read(folder, config, shard, shape, positions, None, None, report, adapters)
    if path.is_dir():
        packed = PackedFolder(path)
        weights = _read(folder, config, shard, shape, positions, packed, None, report, adapters)
        packed.close()
        return weights
    with keeping_packed(path) as (begun, keep):
        return _read(folder, config, shard, shape, positions, begun, keep, report, adapters)


def _read(
    folder: Path,
    config: ModelConfig,
    shard: Shard,
    shape: Shape,
    positions: int,
    packed: PackedFolder | None,
    keep: Keep | None,
    report: Report,
    adapters: AdapterSource | None,
) -> Weights:
    """``packed``: where linears are that were packed before; ``keep`` gets those of each other
    layer."""
    source = _source(folder, config)
    cut = cut_of(config, shard)
    base = Loader(source=source, shape=shape, cut=cut, arena=Arena(), adapters=adapters)

    def load(name: str, part: Callable[[Loader[Any]], _T]) -> _T:
        before = packed.read(name) if packed is not None else {}
        loader = replace(base, kept=before, packed={})
        loaded = part(loader)
        if keep is not None and not before:
            keep(name, loader.packed)
        return loaded

    def layer(index: int, kind: Kind) -> Any:
        prefix = f"model.layers.{index}."
        module = architecture_of(shape)
        report(index, len(config.layers))
        return load(f"layer-{index}", lambda loader: module.load_layer(loader, kind, prefix))

    table, vocab = load("head", lambda loader: _vocabulary(loader, config, shard))
    return Weights(
        plan=config.layers,
        embed=EmbedWeights(table, _rotary(config.ropes, shape.rotary_dim, positions)),
        layers=tuple(layer(index, planned.kind) for index, planned in enumerate(config.layers)),
        head=HeadWeights(architecture_of(shape).head_norm(base), [vocab]),
    )


def _source(folder: Path, config: ModelConfig) -> Source:
    if config.file_types is not None:
        return GgufCheckpoint(folder)
    files = Checkpoint(folder)
    if config.scheme is None:
        return files
    return QuantizedCheckpoint(files=files, scheme=config.scheme)


def _vocabulary(load: Loader[Any], config: ModelConfig, shard: Shard) -> tuple[Tensor, Tensor]:
    """The packed embedding table, and this rank's rows of the output projection: one tensor where
    they are the same."""
    size = (config.vocab_size, config.hidden_size)
    rows = shard.vocab
    fmt = load.shape.head_format

    def linear(name: str, part: slice, pack: Packer = pack_in) -> Tensor:
        def weight() -> Weight:
            return load.source.get(f"{name.removesuffix('.rows')}.weight", size)[part]

        return load.linear(name, weight, fmt=fmt, pack=pack)[0]

    table = linear("model.embed_tokens", slice(None), pack_table)
    if not config.tie_word_embeddings:
        return table, linear("lm_head", slice(rows.start, rows.stop))
    if len(rows) == config.vocab_size and providers.active().pack is None:
        return table, table
    return table, linear("model.embed_tokens.rows", slice(rows.start, rows.stop))


def _rotary(ropes: Sequence[RopeConfig], dim: int, positions: int) -> list[Tensor]:
    tables = []
    for rope in ropes:
        frequencies = torch.tensor(rope.inverse_frequencies(dim, positions))
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
        tables += [angles.cos() * rope.amplitude(), angles.sin() * rope.amplitude()]
    return tables


class _Random:
    """A source of tensors that keep activations near one."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        values: Tensor = torch.randn(shape, generator=self._generator)
        if len(shape) > 1:
            return values.div_(shape[-1] ** 0.5)
        return values.mul_(0.1).add_(1 if name.endswith("norm.weight") else 0)

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> Tensor:
        del index
        return self.get(name, shape[:0:-1])


def random_weights(
    shape: Shape,
    plan: Sequence[LayerPlan],
    positions: int,
    generator: torch.Generator,
    adapters: AdapterSource | None = None,
) -> Weights:
    """Random weights of the shape's formats, for layers of the plan. ``adapters``: those of a shape
    that has some, if not random ones."""
    source, arena = _Random(generator), Arena()
    if shape.adapters is not None and adapters is None:
        adapters = RandomAdapters(shape.adapters, generator)
    load = Loader(source=source, shape=shape, cut=_whole(shape), arena=arena, adapters=adapters)
    module, hidden = architecture_of(shape), shape.hidden_size
    angles = torch.rand(
        shape.options.ropes, positions, shape.rotary_dim // 2, generator=generator
    ).mul_(6.28)

    def rows(count: int, scale: float, pack: Packer) -> Tensor:
        return _random_rows(arena, (count, hidden), scale, pack, shape.head_format, generator)

    return Weights(
        plan=tuple(plan),
        embed=EmbedWeights(
            rows(sum(shape.vocab_widths), 1.0, pack_table),
            [table for rope in angles for table in (rope.cos(), rope.sin())],
        ),
        layers=tuple(
            module.load_layer(load, layer.kind, f"model.layers.{index}.")
            for index, layer in enumerate(plan)
        ),
        head=HeadWeights(module.head_norm(load), [rows(shape.vocab_size, hidden**-0.5, pack_in)]),
    )


def _random_rows(
    arena: Arena,
    size: tuple[int, int],
    scale: float,
    pack: Packer,
    fmt: Format,
    generator: torch.Generator,
) -> Tensor:
    """Packed random rows of a vocabulary's size. Panels are drawn out of a few that are packed: to
    pack them all takes seconds, the most of what a verification would take."""
    few = min(size[0], RANDOM_ROWS)
    values = torch.randn(few, size[1], generator=generator).mul_(scale)
    if fmt == Format.MIXED:
        mixed = arena.empty(packed_size(*size, fmt))
        [part] = write_parts(mixed, [MixedPart(Format.Q8_0, size[0])], size[1])
        part.copy_(_random_rows(arena, size, scale, pack, Format.Q8_0, generator))
        return mixed
    if few == size[0] or (pack is pack_in and providers.active().pack is not None):
        return pack(arena, values[torch.arange(size[0]) % few], fmt)
    panels = pack_table(arena, values, fmt)
    out = arena.empty(packed_size(*size, fmt))
    chosen = torch.randint(len(panels), (len(out),), generator=generator)
    return torch.index_select(panels, 0, chosen, out=out)


def _whole(shape: Shape) -> Cut:
    """A shard's sizes as if they were the model's."""

    def whole(size: int) -> Part:
        return Part(0, size, size)

    return Cut(
        whole(shape.q_heads),
        whole(shape.kv_heads),
        whole(shape.intermediate_size),
        whole(getattr(shape.options, "expert_size", 0)),
        whole(getattr(shape.options, "shared_size", 0)),
    )
