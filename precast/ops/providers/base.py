"""What a provider is, and what was chosen."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from torch import Tensor

from precast.ops.native import ABI_VERSION
from precast.ops.packing import Format

OPERATORS: Final = (
    "embedding",
    "fused_experts",
    "gelu_tanh_and_mul",
    "linear",
    "paged_attention",
    "rms_norm",
    "rotary",
    "route",
    "sigmoid_and_mul",
    "silu_and_mul",
    "soft_cap",
)
"""What providers may serve. Collectives are always ours: upstream's leave ranks of a dead peer
spinning and its segments behind."""
NATIVE: Final = "native"
Kernel = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a model asks of its operators."""

    weight_dtype: str
    """Of weights that are not quantised, and of rounded activations: "fp32", "bf16", "fp16"."""
    formats: frozenset[Format]
    """Of its linears."""
    kv_dtype: str
    head_dim: int
    uneven_groups: bool = False
    """Whether KV heads differ in how many query heads attend to them."""
    experts: int = 0
    """Of a mixture; 0: the model has none."""
    limited_experts: bool = False
    """Whether they have biases, and a limit for what they compute."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Who serves an operator."""

    provider: str
    reason: str = ""
    """Why it is not the one that was asked for; empty if it is."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Who serves what, and what follows from it for weights, caches and graphs."""

    wanted: str
    choices: Mapping[str, Choice]
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    """For each operator that is not native: what replaces it."""
    pack: Callable[[Tensor, Format], Tensor] | None = None
    """Packs a linear's weights [N, K] to uint8; None: as the native kernels want them."""
    pack_experts: Callable[[Iterable[Tensor], int, Format], Tensor] | None = None
    """Packs all experts' [N, K], of so many linears one below the other, to uint8 [experts, 1,
    bytes]; None: one by one, as the native kernels want them."""
    token_major_cache: bool = False
    """Whether a token's keys and values lie side by side in memory."""
    rounds: bool = False
    """Whether activations are rounded to less than float32."""
    torch_threads: bool = False
    """Whether kernels run on torch's threads instead of our own."""
    version: str = ""
    """Of what is not native: weights that it packed are for no other."""

    @property
    def provider(self) -> str:
        """The name in a graph's key: what was asked for, if it serves anything."""
        return self.wanted if self.kernels else NATIVE

    @property
    def abi(self) -> str:
        """In a graph's key: our operators' version, and what is not native."""
        others = ["+".join(sorted(self.kernels)), self.version] if self.kernels else []
        return ":".join(part for part in (str(ABI_VERSION), *others) if part)

    def is_native(self, operator: str) -> bool:
        return operator not in self.kernels
