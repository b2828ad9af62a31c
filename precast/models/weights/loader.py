"""Reads a layer's weights out of a checkpoint, cut for one rank and packed for the kernels.

Architectures say which tensors they have in these terms, once: the same words load a checkpoint and
make the random weights that a capture is verified with (``Source``).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol

import torch
from torch import Tensor

from precast.errors import ModelCorrupt
from precast.models.config import ModelConfig
from precast.models.layers import (
    AttentionWeights,
    DecoderWeights,
    ExpertWeights,
    Linear,
    MlpWeights,
)
from precast.models.shape import ModelShape, O_co
from precast.models.sharding import Shard
from precast.models.weights.adapter_folder import target_of
from precast.models.weights.adapters import ADAPTER_DTYPE, AdapterSource, fill
from precast.ops import providers
from precast.ops.packing import Format, pack_into, packed_size_of
from precast.ops.scaled import Weight, below, floats, in_order
from precast.system.memory import Arena


class Source(Protocol):
    """Where tensors come from."""

    def get(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The whole tensor, quantised if that is how it comes. Raises ModelCorrupt if it is missing
        or of another shape."""

    def expert(self, name: str, index: int, shape: tuple[int, int, int]) -> Weight:
        """One of the linears in a tensor [experts, inputs, outputs], as [outputs, inputs]."""


class Part(NamedTuple):
    """A rank's share of rows or columns, and how many there are over all ranks."""

    start: int
    stop: int
    total: int

    def __mul__(self, size: int) -> "Part":  # type: ignore[override]
        """The share in units that ``size`` of make one of these."""
        return Part(self.start * size, self.stop * size, self.total * size)


class Cut(NamedTuple):
    """A rank's share of a model's layers."""

    q_heads: Part
    kv_heads: Part
    mlp: Part
    experts: Part
    shared: Part


def cut_of(config: ModelConfig, shard: Shard) -> Cut:
    def part(share: range, total: int) -> Part:
        return Part(share.start, share.stop, total)

    return Cut(
        part(shard.q_heads, config.q_heads),
        part(shard.kv_heads, config.kv_heads),
        part(shard.mlp, config.intermediate_size),
        part(shard.experts, config.expert_size),
        part(shard.shared, config.shared_size),
    )


class Rows(NamedTuple):
    """Some rows of a matrix that has ``total``."""

    name: str
    """Of the module: without ".weight"."""
    start: int
    stop: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Loader(Generic[O_co]):
    source: Source
    shape: ModelShape[O_co]
    cut: Cut
    arena: Arena
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    """Linears that were packed before, by name."""
    packed: dict[str, Tensor] = field(default_factory=dict)
    """Those that this loader has given out."""
    adapters: AdapterSource | None = None
    """As ``shape`` says; None: there are none."""

    def norm(self, name: str, size: int | None = None) -> Tensor:
        """float32 [size], by default [H]; a copy, as everything is that serves: a checkpoint that
        is cut while it is mapped would end the rank with SIGBUS."""
        weight = self.source.get(f"{name}.weight", (size or self.shape.hidden_size,))
        return self.arena.copy(floats(weight).float())

    def decoder(
        self,
        prefix: str,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norms: bool = False,
        mlp_bias: bool = False,
    ) -> DecoderWeights:
        """A layer by the names that most architectures use."""
        return DecoderWeights(
            attention_norm=self.norm(f"{prefix}input_layernorm"),
            attention=self.attention(
                f"{prefix}self_attn.",
                qkv_bias=qkv_bias,
                output_bias=output_bias,
                qk_norms=qk_norms,
            ),
            mlp_norm=self.norm(f"{prefix}post_attention_layernorm"),
            mlp=self.mlp(f"{prefix}mlp.", bias=mlp_bias),
        )

    def attention(
        self,
        prefix: str,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        qk_norms: bool = False,
        interleaved: int = 0,
    ) -> AttentionWeights:
        """``q_proj``, ``k_proj``, ``v_proj``, ``o_proj`` and perhaps ``q_norm`` and ``k_norm``.

        ``interleaved``: so many features of a head are rotated with their neighbours, and become
        those that kernels rotate.
        """
        dim = self.shape.head_dim
        names = (f"{prefix}{name}_norm" for name in ("q", "k")) if qk_norms else ()
        q, kv = self.cut.q_heads * dim, self.cut.kv_heads * dim
        parts = [
            Rows(f"{prefix}{name}_proj", *cut) for name, cut in zip("qkv", (q, kv, kv), strict=True)
        ]
        order = self._by_halves(interleaved) if interleaved else None
        return AttentionWeights(
            qkv=self.rows(parts, qkv_bias, order),
            output=self.columns(f"{prefix}o_proj", q, output_bias),
            qk_norms=[self.norm(name, dim) for name in names],
        )

    def mlp(self, prefix: str, *, bias: bool = False, part: Part | None = None) -> MlpWeights:
        """``gate_proj``, ``up_proj`` and ``down_proj``; ``part``: of their columns, if they are not
        as many as the model's ``intermediate_size``."""
        cut = self.cut.mlp if part is None else part
        gate_up = [Rows(f"{prefix}{name}_proj", *cut) for name in ("gate", "up")]
        return MlpWeights(
            gate_up=self.rows(gate_up, bias),
            down=self.columns(f"{prefix}down_proj", cut, bias),
        )

    def experts(
        self,
        prefix: str,
        count: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> ExpertWeights:
        """The router ``gate`` and, for each expert, what ``mlp`` reads."""
        hidden, cut = self.shape.hidden_size, self.cut.experts

        def share(expert: int, name: str) -> Weight:
            weight = self.source.get(f"{prefix}experts.{expert}.{name}.weight", (cut.total, hidden))
            return weight[cut.start : cut.stop]

        def down(expert: int) -> Weight:
            name = f"{prefix}experts.{expert}.{names[2]}.weight"
            return self.source.get(name, (hidden, cut.total))[:, cut.start : cut.stop]

        def gate_up(expert: int) -> Weight:
            return below([share(expert, name) for name in names[:2]])

        return ExpertWeights(
            router=self.plain(f"{prefix}gate", count),
            gate_up=self.stack(f"{prefix}experts.gate_up", count, gate_up, parts=2),
            down=self.stack(f"{prefix}experts.down", count, down),
        )

    def plain(self, name: str, rows: int, bias: bool = False) -> Linear:
        """A linear [rows, H] that is not quantised, whole on every rank."""
        return self.linear(
            name,
            lambda: self.source.get(f"{name}.weight", (rows, self.shape.hidden_size)),
            self._bias(name, rows) if bias else None,
            fmt=self.shape.format_of("none"),
        )

    def stack(
        self, name: str, count: int, weight: Callable[[int], Weight], parts: int = 1
    ) -> Tensor:
        """``count`` packed linears in one tensor, packed now unless they are kept; ``parts``: how
        many matrices each is of, one below the other."""
        fmt, custom = self.shape.linear_format, providers.active().pack_experts
        if name in self.kept:
            packed = self.arena.copy(self.kept[name])
        elif custom:
            packed = self.arena.copy(custom(map(floats, map(weight, range(count))), parts, fmt))
        else:
            packed = self._stacked(name, count, weight, fmt)
        self.packed[name] = packed
        return packed

    def _stacked(
        self, name: str, count: int, weight: Callable[[int], Weight], fmt: Format
    ) -> Tensor:
        first = weight(0)
        size = packed_size_of(first, fmt)
        packed = self.arena.empty((count, *size))
        for index in range(count):
            one = first if index == 0 else weight(index)
            if packed_size_of(one, fmt) != size:
                raise ModelCorrupt(f"{name}: experts differ in their formats")
            pack_into(packed[index], one, fmt)
        return packed

    def _by_halves(self, rotated: int) -> Tensor:
        """Order of this rank's rows of queries, keys and values: of each head of queries and keys
        the even ones of the rotated, the odd ones, and the others."""
        dim, shape = self.shape.head_dim, self.shape
        head = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, dim)]
        heads = torch.arange(shape.q_heads + shape.kv_heads)[:, None] * dim
        values = torch.arange(shape.kv_heads * dim) + heads.numel() * dim
        return torch.cat([(heads + torch.tensor(head)).flatten(), values])

    def rows(
        self, parts: Sequence[Rows], bias: bool = False, order: Tensor | None = None
    ) -> Linear:
        """One linear of rows of several matrices, one below the other; ``order``: which of these
        come where."""
        hidden = self.shape.hidden_size

        def share(part: Rows) -> Weight:
            whole = self.source.get(f"{part.name}.weight", (part.total, hidden))
            return whole[part.start : part.stop]

        def weight() -> Weight:
            rows = below([share(part) for part in parts])
            return rows if order is None else in_order(rows, order)

        adapted = self._adapted(parts, Part(0, hidden, hidden), order)
        if not bias:
            return self.linear(parts[0].name, weight) + adapted
        added = torch.cat([self._bias(p.name, p.total)[p.start : p.stop] for p in parts])
        added = added if order is None else added[order]
        return self.linear(parts[0].name, weight, added) + adapted

    def columns(self, name: str, part: Part, bias: bool = False) -> Linear:
        """A linear of this rank's columns. Ranks' results are summed: the first adds the bias."""
        hidden = self.shape.hidden_size

        def weight() -> Weight:
            whole = self.source.get(f"{name}.weight", (hidden, part.total))
            return whole[:, part.start : part.stop]

        added = self._bias(name, hidden) if bias else None
        if added is not None and part.start > 0:
            added = torch.zeros_like(added)
        adapted = self._adapted([Rows(name, 0, hidden, hidden)], part, None)
        return self.linear(name, weight, added) + adapted

    def _adapted(self, parts: Sequence[Rows], columns: Part, order: Tensor | None) -> list[Tensor]:
        """Rows' slots, A [adapters, K, parts * rank] and B [adapters, rank, N] for a
        linear of these rows and columns; nothing where none changes any of the kind. Each rank has
        its rows of B, or its columns of A: what ranks add up is the whole."""
        shape, source = self.shape.adapters, self.adapters
        if shape is None or source is None or target_of(parts[0].name) not in shape.targets:
            return []
        sizes = [part.stop - part.start for part in parts]
        inputs = slice(columns.start, columns.stop)
        width = columns.stop - columns.start
        a = torch.zeros(source.count, width, len(parts) * shape.rank, dtype=ADAPTER_DTYPE)
        b = torch.zeros(source.count, shape.rank, sum(sizes), dtype=ADAPTER_DTYPE)
        for number in range(source.count):
            for at, part in enumerate(parts):
                found = source.get(number, part.name, part.total, columns.total)
                if found is not None:
                    own, rows = found[0][:, inputs], found[1][part.start : part.stop]
                    fill(a[number], b[number], at, sum(sizes[:at]), rows, own, shape.rank)
        b = b if order is None else b[:, :, order]
        return [source.slots, self.arena.copy(a), self.arena.copy(b.contiguous())]

    def _bias(self, name: str, size: int) -> Tensor:
        return floats(self.source.get(f"{name}.bias", (size,)))

    def linear(
        self,
        name: str,
        weight: Callable[[], Weight],
        bias: Tensor | None = None,
        fmt: Format | None = None,
        pack: "Packer | None" = None,
    ) -> Linear:
        """A linear of [N, K] weights, packed now unless it is kept; ``fmt``: the layers' if None;
        ``pack``: ``pack_in`` if None."""
        if name in self.kept:
            packed = self.arena.copy(self.kept[name])
        else:
            fmt = self.shape.linear_format if fmt is None else fmt
            packed = (pack or pack_in)(self.arena, weight(), fmt)
        self.packed[name] = packed
        return [packed] if bias is None else [packed, self.arena.copy(bias.float())]


def head_norm(load: Loader[O_co]) -> Tensor:
    return load.norm("model.norm")


Packer = Callable[[Arena, Weight, Format], Tensor]


def pack_in(arena: Arena, weight: Weight, fmt: Format) -> Tensor:
    """A linear's [N, K] weights packed in the arena's memory, as the kernel provider wants them."""
    custom = providers.active().pack
    return arena.copy(custom(floats(weight), fmt)) if custom else pack_table(arena, weight, fmt)


def pack_table(arena: Arena, weight: Weight, fmt: Format) -> Tensor:
    """An embedding table [V, H] packed in the arena's memory."""
    return pack_into(arena.empty(packed_size_of(weight, fmt)), weight, fmt)
