"""Loads one rank's weights out of a Hugging Face folder, packed for the native kernels."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_leaves

from precast.errors import ModelCorrupt
from precast.models.config import ModelConfig
from precast.models.llama import (
    EmbedWeights,
    HeadWeights,
    LayerWeights,
    Linear,
    LlamaShape,
)
from precast.models.sharding import Shard
from precast.ops.memory import Arena
from precast.ops.packing import Format, pack_into, packed_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A rank's weights as the model's functions take them."""

    embed: EmbedWeights
    layers: tuple[LayerWeights, ...]
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
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelCorrupt(f"{folder}: no .safetensors file")
        for path in paths:
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
    folder: Path, config: ModelConfig, shard: Shard, shape: LlamaShape, positions: int
) -> Weights:
    """Weights of one rank; rotary tables reach ``positions``. Raises ModelCorrupt.

    One layer at a time is read, cut and packed, so that the peak is the packed weights plus a
    layer.
    """
    arena = Arena()
    with _open_checkpoint(folder) as checkpoint:
        hidden = (config.vocab_size, config.hidden_size)
        table = checkpoint.get("model.embed_tokens.weight", hidden).to(DTYPES[shape.weight_dtype])
        vocab = table if config.tie_word_embeddings else checkpoint.get("lm_head.weight", hidden)
        return Weights(
            embed=EmbedWeights(table, *_rotary(config, positions)),
            layers=tuple(
                _layer(checkpoint, index, config, shard, shape, arena)
                for index in range(config.num_layers)
            ),
            head=HeadWeights(
                checkpoint.get("model.norm.weight", (config.hidden_size,)).float(),
                pack_linear(
                    shape.head_format, vocab[shard.vocab.start : shard.vocab.stop], None, arena
                ),
            ),
        )


def pack_linear(fmt: Format, weight: Tensor, bias: Tensor | None, arena: Arena) -> Linear:
    """[N, K] weights, and a bias, packed in the arena's memory."""
    packed = pack_into(arena.empty(packed_size(weight.shape[0], weight.shape[1], fmt)), weight, fmt)
    return [packed] if bias is None else [packed, arena.copy(bias.float())]


def _rotary(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    frequencies = torch.tensor(config.rope.inverse_frequencies(config.head_dim))
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def _layer(
    checkpoint: _Checkpoint,
    index: int,
    config: ModelConfig,
    shard: Shard,
    shape: LlamaShape,
    arena: Arena,
) -> LayerWeights:
    prefix = f"model.layers.{index}."
    dim, hidden = config.head_dim, config.hidden_size

    def rows(name: str, total: int, part: range, has_bias: bool) -> tuple[Tensor, Tensor | None]:
        weight = checkpoint.get(f"{prefix}{name}.weight", (total, hidden))[part.start : part.stop]
        if not has_bias:
            return weight, None
        bias = checkpoint.get(f"{prefix}{name}.bias", (total,))[part.start : part.stop]
        return weight, bias

    def columns(name: str, total: int, part: range, has_bias: bool) -> Linear:
        weight = checkpoint.get(f"{prefix}{name}.weight", (hidden, total))
        bias = checkpoint.get(f"{prefix}{name}.bias", (hidden,)) if has_bias else None
        # Ranks' results are summed, so only the first adds the bias.
        if bias is not None and part.start > 0:
            bias = torch.zeros_like(bias)
        return pack_linear(
            shape.linear_format, weight[:, part.start : part.stop].contiguous(), bias, arena
        )

    def stacked(parts: list[tuple[Tensor, Tensor | None]]) -> Linear:
        biases = [bias for _, bias in parts if bias is not None]
        bias = torch.cat(biases) if biases else None
        return pack_linear(
            shape.linear_format, torch.cat([weight for weight, _ in parts]), bias, arena
        )

    def scaled(part: range) -> range:
        return range(part.start * dim, part.stop * dim)

    q_total, kv_total = config.q_heads * dim, config.kv_heads * dim
    attention_bias, mlp_bias = config.attention_bias, config.mlp_bias
    return LayerWeights(
        attention_norm=checkpoint.get(f"{prefix}input_layernorm.weight", (hidden,)).float(),
        qkv=stacked(
            [
                rows("self_attn.q_proj", q_total, scaled(shard.q_heads), attention_bias),
                rows("self_attn.k_proj", kv_total, scaled(shard.kv_heads), attention_bias),
                rows("self_attn.v_proj", kv_total, scaled(shard.kv_heads), attention_bias),
            ]
        ),
        output=columns("self_attn.o_proj", q_total, scaled(shard.q_heads), attention_bias),
        mlp_norm=checkpoint.get(f"{prefix}post_attention_layernorm.weight", (hidden,)).float(),
        gate_up=stacked(
            [
                rows("mlp.gate_proj", config.intermediate_size, shard.mlp, mlp_bias),
                rows("mlp.up_proj", config.intermediate_size, shard.mlp, mlp_bias),
            ]
        ),
        down=columns("mlp.down_proj", config.intermediate_size, shard.mlp, mlp_bias),
    )
