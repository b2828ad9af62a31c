"""A rank's weights: out of a Hugging Face folder, or random ones of the same formats."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precast.errors import ModelCorrupt
from precast.models.architectures import architecture_of
from precast.models.blocks import EmbedWeights, HeadWeights, Shape
from precast.models.catalog import weight_files
from precast.models.config import ModelConfig
from precast.models.loader import Cut, Loader, Part, cut_of, pack_linear
from precast.models.options import LayerPlan
from precast.models.rope import RopeConfig
from precast.models.sharding import Shard
from precast.ops.memory import Arena

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


class _Checkpoint:
    """The tensors of a folder's safetensors files, by name; files are mapped, not read at once."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._files = {}
        for path in weight_files(folder):
            file = stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self._files:
            raise ModelCorrupt(f"{self._folder}: tensor {name} is missing")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelCorrupt(
                f"{self._folder}: tensor {name} has shape {tuple(tensor.shape)}, not {shape}"
            )
        return tensor


@contextmanager
def _open_checkpoint(folder: Path) -> Iterator[_Checkpoint]:
    try:
        with ExitStack() as stack:
            yield _Checkpoint(folder, stack)
    except (SafetensorError, OSError) as error:
        raise ModelCorrupt(f"{folder}: weights can't be read: {error}") from error


def load_weights(
    folder: Path, config: ModelConfig, shard: Shard, shape: Shape, positions: int
) -> Weights:
    """Weights of one rank; rotary tables reach ``positions``. Raises ModelCorrupt.

    One layer at a time is read, cut and packed, so that the peak is the packed weights plus a
    layer.
    """
    arena = Arena()
    with _open_checkpoint(folder) as checkpoint:
        load = Loader(source=checkpoint, shape=shape, cut=cut_of(config, shard), arena=arena)
        hidden = (config.vocab_size, config.hidden_size)
        table = checkpoint.get("model.embed_tokens.weight", hidden).to(DTYPES[shape.weight_dtype])
        vocab = table if config.tie_word_embeddings else checkpoint.get("lm_head.weight", hidden)
        return Weights(
            plan=config.layers,
            embed=EmbedWeights(table, _rotary(config.ropes, shape.rotary_dim, positions)),
            layers=_layers(load, config.layers),
            head=HeadWeights(
                architecture_of(shape).head_norm(load),
                pack_linear(
                    shape.head_format, vocab[shard.vocab.start : shard.vocab.stop], None, arena
                ),
            ),
        )


def _layers(load: Loader[Any], plan: Sequence[LayerPlan]) -> tuple[Any, ...]:
    read = architecture_of(load.shape).load_layer
    return tuple(
        read(load, layer.kind, f"model.layers.{index}.") for index, layer in enumerate(plan)
    )


def _rotary(ropes: Sequence[RopeConfig], dim: int, positions: int) -> list[Tensor]:
    tables = []
    for rope in ropes:
        frequencies = torch.tensor(rope.inverse_frequencies(dim))
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


def random_weights(
    shape: Shape, plan: Sequence[LayerPlan], positions: int, generator: torch.Generator
) -> Weights:
    """Random weights of the shape's formats, for layers of the plan."""
    source, arena = _Random(generator), Arena()
    load = Loader(source=source, shape=shape, cut=_whole(shape), arena=arena)
    hidden = shape.hidden_size
    angles = torch.rand(
        shape.options.ropes, positions, shape.rotary_dim // 2, generator=generator
    ).mul_(6.28)
    table = torch.randn(sum(shape.vocab_widths), hidden, generator=generator)
    vocab = source.get("lm_head.weight", (shape.vocab_size, hidden))
    return Weights(
        plan=tuple(plan),
        embed=EmbedWeights(
            table.to(DTYPES[shape.weight_dtype]),
            [table for rope in angles for table in (rope.cos(), rope.sin())],
        ),
        layers=_layers(load, plan),
        head=HeadWeights(
            architecture_of(shape).head_norm(load),
            pack_linear(shape.head_format, vocab, None, arena),
        ),
    )


def _whole(shape: Shape) -> Cut:
    """A shard's sizes as if they were the model's."""

    def whole(size: int) -> Part:
        return Part(0, size, size)

    return Cut(
        whole(shape.q_heads),
        whole(shape.kv_heads),
        whole(shape.intermediate_size),
        whole(getattr(shape.options, "expert_size", 0)),
    )
