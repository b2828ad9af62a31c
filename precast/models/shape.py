"""Everything static that a rank's graphs depend on."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final, Generic, Literal, TypeVar

from precast.models.config import ModelConfig
from precast.models.options import Kind, Options
from precast.models.precision import Precision
from precast.models.sharding import Shard

if TYPE_CHECKING:
    from precast.ops.packing import Format

MAX_ADAPTER_RANK: Final = 256
AdapterTarget = Literal["down", "gate_up", "output", "qkv"]
O_co = TypeVar("O_co", bound=Options, covariant=True)


@dataclass(frozen=True, kw_only=True)
class AdapterShape:
    """What graphs depend on of low-rank adapters. How many there are is no part of it."""

    rank: int
    """Of the largest; the others are filled up with zeros."""
    targets: tuple[AdapterTarget, ...]
    """Linears that one of them changes, sorted."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(Generic[O_co]):
    """Head, MLP and vocabulary sizes are this rank's."""

    architecture: str
    hidden_size: int
    query_groups: tuple[int, ...]
    """For each KV head, how many query heads attend to it."""
    head_dim: int
    intermediate_size: int
    vocab_widths: tuple[int, ...]
    """Vocabulary rows of each rank; one entry without tensor parallelism."""
    vocab_size: int
    rms_norm_eps: float
    options: O_co
    weight_dtype: str
    quantization: str
    """Format of the layers' linears; "none": ``weight_dtype``."""
    head_quantization: str
    """Format of the output projection, likewise."""
    kv_dtype: str
    adapters: AdapterShape | None = None
    """None: there are none."""

    @property
    def q_heads(self) -> int:
        return sum(self.query_groups)

    @property
    def kv_heads(self) -> int:
        return len(self.query_groups)

    @property
    def tp_size(self) -> int:
        return len(self.vocab_widths)

    @property
    def linear_format(self) -> "Format":
        return self.format_of(self.quantization)

    @property
    def head_format(self) -> "Format":
        return self.format_of(self.head_quantization)

    def format_of(self, quantization: str) -> "Format":
        from precast.ops.packing import Format  # it brings torch, and a leader has shapes too

        if quantization == "file":
            return Format.MIXED
        return Format[(self.weight_dtype if quantization == "none" else quantization).upper()]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return self.options.kinds

    @property
    def rotary_dim(self) -> int:
        return self.options.rotary_dim or self.head_dim


def shape_of(
    config: ModelConfig,
    shard: Shard,
    precision: Precision,
    adapters: AdapterShape | None = None,
) -> ModelShape[Options]:
    return ModelShape(
        architecture=config.architecture,
        hidden_size=config.hidden_size,
        query_groups=shard.query_groups,
        head_dim=config.head_dim,
        intermediate_size=len(shard.mlp),
        vocab_widths=shard.vocab_widths,
        vocab_size=len(shard.vocab),
        rms_norm_eps=config.rms_norm_eps,
        options=config.options.on_rank(len(shard.experts), len(shard.shared)),
        adapters=adapters,
        **asdict(precision),
    )
